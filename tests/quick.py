"""XLA's flags for tests on a CPU: a third of the time to compile, the same program in every process."""

import importlib.metadata

FLAGS = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=2"
if importlib.metadata.version("jaxlib").startswith("0.10."):  # XLA ends the process at a flag that it has not
  FLAGS += " --xla_cpu_use_fusion_emitters=false"
