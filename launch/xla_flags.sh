# XLA flags per platform, each with its reason; the scripts beside this one read it with `source`.
#   jflow_xla_flags gpu|tpu|cpu    adds to XLA_FLAGS and LIBTPU_INIT_ARGS what is not set there already
# Figures are from ahead-of-time compilation for the target, without the hardware, except those marked "measured".

_add() { # VARIABLE FLAG: a flag that the user has set wins
  local name=${2%%=*}
  [[ " ${!1:-} " == *" $name"[=\ ]* ]] || export "$1=${!1:+${!1} }$2"
}

jflow_xla_flags() {
  case "$1" in
    gpu)
      # Compute goes on while weights are gathered. H100 has it by default (19 asynchronous gathers of stage 2's step);
      # for A100 the compiler makes none without this flag, and 19 with it.
      _add XLA_FLAGS --xla_gpu_enable_latency_hiding_scheduler=true
      # One gather and one reduce-scatter per layer, not per matrix: a layer has 51.4 million parameters, 103 MB in bf16.
      _add XLA_FLAGS --xla_gpu_all_gather_combine_threshold_bytes=134217728
      _add XLA_FLAGS --xla_gpu_reduce_scatter_combine_threshold_bytes=134217728
      ;;
    tpu)
      # Without it, XLA cuts each matmul into a ring of small ones with permutes between them (windowed einsum), which
      # for this model costs more than it hides: estimated step of stage 2 on v5e-16 falls from 915 to 353 ms.
      _add LIBTPU_INIT_ARGS --xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000
      # More of the fast memory for one fusion; the value that MaxText ships for v5e and v6e.
      _add LIBTPU_INIT_ARGS --xla_tpu_scoped_vmem_limit_kib=98304
      ;;
    cpu)
      # A bit-identical restart needs nothing here. What XLA allocates in a step lies in huge pages (a third less CPU time,
      # measured) and stays with the process between steps, in place of 1,600 page faults a second (6 % more steps,
      # measured). Read by glibc 2.35 or newer, else ignored.
      local malloc=glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1:glibc.malloc.mmap_threshold=2147483648
      malloc+=:glibc.malloc.trim_threshold=8589934592:glibc.malloc.top_pad=268435456
      export GLIBC_TUNABLES=${GLIBC_TUNABLES:-$malloc}
      ;;
    *) echo "jflow_xla_flags: unknown platform '$1': use gpu, tpu or cpu" >&2; return 2 ;;
  esac
  # Bit-identical restarts on GPUs too: --xla_gpu_deterministic_ops=true. Off, since it costs speed; set it in XLA_FLAGS.
}
