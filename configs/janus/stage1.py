"""Stage 1 of Janus: trains the aligners, gen_embed and gen_head between frozen LLM, SigLIP and VQ.

  jflow train --config=janus/stage1:pro-1b --workdir=runs/janus1 --config.train.init_from=runs/parts \\
    --config.train.init_parts="(('vq','Janus-Pro-1B'),)" --config.data.tokenizer=runs/parts/tokenizer \\
    --config.mesh.fsdp=8 --config.train.accumulation=8 \\
    --config.data.sources.understanding="(('DIR', 1.0),)" --config.data.sources.generation="(('DIR', 1.0),)"
  jflow train --config=janus/stage1:tiny --workdir=runs/tiny1               # a minute or two, built-in data

runs/parts: LLM and SigLIP of `convert --from=huggingface-parts` (../README.md); what a JanusFlow has between them is
left out. The VQ, LlamaGen's VQ-16, is that of any published Janus.
Data: captions of ShareGPT4V to read, ImageNet with class names as prompts to write, in equal parts; Pro writes three
times as much and trains twice as long. Result: the papers give no numbers, and we have not run this size.
"""

from configs.janus import recipe


def get_config(size: str = "1b"):
  return recipe.at_stage(size, 1)
