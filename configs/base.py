"""Defaults of every field of a run: value, unit, source. The stage files set what differs.

`--config=configs/stage2.py:tiny` picks a size, `--config.train.steps=100` sets a field. Sizes:
  384 (default), 256   the paper's models; name your data in --config.data.sources.*
  tiny, quick, shapes, world, mid    small ones on the built-in world: configs/world.py
"""

from collections.abc import Callable, Mapping

from ml_collections import ConfigDict

from configs import models, world


def _paper_384(c: ConfigDict) -> None:
  c.model = models.janusflow_384()


def _paper_256(c: ConfigDict) -> None:
  c.model = models.janusflow_256()
  c.data.row_images = 14


PAPER = {"384": _paper_384, "256": _paper_256}
SIZES = PAPER | world.SIZES


def base(size: str, sizes: Mapping[str, Callable[[ConfigDict], None]] = SIZES) -> ConfigDict:
  """Returns the config of a size before a stage sets its own fields; a recipe may have sizes of its own."""
  size = size or "384"
  if size not in sizes:
    raise ValueError(f"unknown size {size!r}; choose one of {', '.join(sizes)}")
  c = ConfigDict()
  c.size = size
  c.train = dict(
    steps=0,  # optimizer steps of the stage (table 1); every stage sets it; 0: as many as `epochs` takes
    epochs=0.0,  # passes over all rows of the data, where steps is 0
    batch_size=512,  # packed rows per step (table 1)
    accumulation=1,  # microbatches that a step's rows are cut into
    seed=0,  # of parameters, time, noise, data order
    ema=0.99,  # decay per step (paper section 4.1)
    init_from="",  # checkpoint to start from, of any layout (jflow/interop/README.md); empty: fresh parameters
    init_weights="ema",  # of that checkpoint: "ema" or "raw"
    init_fresh=(),  # parts that may be missing there and then start fresh
    init_parts=(),  # ((part, checkpoint), ...): parts from another checkpoint, for example another SigLIP
    init_dropped=(),  # parts of that checkpoint that this run does not have
    max_skipped=20,  # skipped steps in a row (gradient not finite, or a spike) before the run stops
    spike_sigmas=0.0,  # skip a step whose loss or gradient norm is so many standard deviations up; 0: never
    spike_window=128,  # accepted steps that a spike is judged by
    watchdog_seconds=1800.0,  # after so long without a step, print all stacks and end the process; 0: never
    validation_every=0,  # steps between the losses of held-out records (data.validation); 0: none
    early_stop=0,  # losses of held-out records in a row that are no better, which end the run; its best step is kept; 0: never
  )
  c.optimizer = dict(
    learning_rate=1e-4,  # between warm-up and cool-down (table 1)
    warmup_steps=2000,  # linear (table 1)
    cooldown_start=0,  # from this step on the rate falls to 0 (not in the paper)
    cooldown_steps=0,  # over so many; 0: it stays
    cooldown_shape="linear",  # or "cosine", half a period
    beta1=0.9,  # table 1
    beta2=0.95,  # table 1
    epsilon=1e-8,  # not in the paper
    weight_decay=0.0,  # table 1
    clip_norm=1.0,  # global norm (table 1)
    # Patterns of matrices that Muon updates in place of AdamW, as ("language_model/layers",); all others then get
    # NAdamW. Not in the paper; tested at :shapes only.
    muon=(),
    # (pattern, factor) pairs, as (("understanding_encoder", 0.1),): the rate of what a pattern names is so many times
    # the learning rate; of all others it is the learning rate. Not in the paper.
    rates=(),
    trained=(),  # patterns of parameter paths; every parameter must match one of the two lists
    frozen=(),
  )
  c.lora = dict(  # low-rank adapters beside frozen matrices (https://arxiv.org/abs/2106.09685); not in the paper
    rank=0,  # 0: none
    alpha=16.0,  # an adapter's output is scaled by alpha / rank
    patterns=("language_model/layers",),  # of the matrices that get one
    frozen_dtype="float32",  # of frozen matrices, not the VAE's; "bfloat16" halves their memory, rounds float32 ones
  )
  c.objective = dict(
    weights=dict(text=1.0, flow=1.0, alignment=1.0),  # the paper gives no weights
    logged=(),  # further losses of the model that are computed and logged, without a weight
    draws=dict(  # how the writer draws what training adds: for flow the logit of the time (not in the paper)
      time_mean=0.0,
      time_std=1.0,
    ),
  )
  # How the model is sampled unless one asks otherwise, by the names of its family's settings (`generate --help`), as
  # dict(guidance=3.0). The run's checkpoints carry it. What is not set is that of train.init_from, else the family's.
  c.sampling = {}
  c.rl = dict(  # reinforcement learning (jflow/rl/README.md) in place of the losses above; not in the paper
    method="",  # "grpo": pictures of the model's own, scored by rewards; "dpo": given pairs of pictures; "": none
    prompts="",  # "shapes": those of the built-in world by data.shapes; or a file of JSON lines with "prompt"
    group=8,  # pictures of a prompt; train.batch_size counts pictures
    rewards=(),  # ((reward, weight), ...): a built-in name, "package.module:function" or http://...
    timeout=60.0,  # seconds for an answer of a reward behind http://
    retries=3,  # further tries of such a reward
    advantage="group",  # reward less its group's mean, by the deviation of the "group" or the "batch"; "mean": by nothing
    clip=1e-3,  # the ratio to the policy that drew counts up to 1 -/+ so much
    kl=0.0,  # weight of the divergence from the model of step 0; 0: none
    updates=1,  # optimizer steps on each batch of pictures, each on a part of it
    pairs="",  # "dpo": a folder with pairs.jsonl of "prompt", "better", "worse"; or "shapes"
    beta=1.0,  # "dpo": how soon a pair counts as learned
    explore={},  # how the policy draws, by the family's own fields
  )
  c.data = dict(
    tokenizer="",  # directory with tokenizer.json; empty: that of train.init_from
    template="plain",  # "plain": prompt and image, image and text; "chat": User / Assistant (stage 3), "pro": Janus-Pro's
    row_tokens=4096,  # tokens of a packed row (paper section 4.1); 0: the context of the model, at most 4096
    row_images=7,  # image slots of a packed row; 0: as many as fit with a few words each
    sources=dict(  # per type: ((directory or "shapes", weight), ...)
      understanding=(),
      generation=(),
      text=(),
    ),
    # (from step, rows understanding : generation : text); types without a source leave it. (): rows of each as there
    # are.
    mixture=((0, (50, 50, 0)),),
    caption_prompt="Generate the caption of this picture.",  # asks for a caption to read (paper section 4.2)
    first_sentence=0.25,  # share of captions cut to their first sentence for generation (paper section 4.2)
    prompt_drop=0.1,  # share of prompts dropped, so that guidance works (paper section 3.4)
    # The square of an image to write: "random" or "center" of its longer side; "pad": all of it with gray margins.
    crop="random",
    # Of pictures to read: "exact", the release's pixels; "scaled": of large upright JPEGs half of them or fewer are
    # decoded.
    decode="exact",
    validation=0.0,  # share of records that are held out of training, by a hash of each
    validation_rows=64,  # rows of them that a loss is computed over, at most; few records are drawn several times
    stored=False,  # True: images to write come as `prepare --latents` (or --codes) has encoded and cropped them
    # Rows in a random order over all shards ("global"), or "blocks": of groups of shards, so that a host reads few
    # files at a time, each for as long as it needs it. Not in the paper.
    order="global",
    block_records=8192,  # "blocks": records of a group of shards at most, each of whose rows is of that group alone
    block_window=4,  # "blocks": groups of a lane whose rows are mixed
    block_lanes=16,  # "blocks": parts of the batch that read groups of their own; as many as hosts, or a multiple
    workers=0,  # loader processes; 0: threads only
    threads=2,  # per process
    prefetch=2,  # batches ahead per process
    plan_cache="~/.cache/jflow",  # lengths and packing plans that cannot be kept beside their records; empty: none
    cache="~/.cache/jflow",  # copies of shards that lie in a store (gs://, s3://, ...), shared by a host's processes
    cache_gib=100.0,  # GiB of them at most; those that were not read for the longest are removed first
    max_rejected_share=0.01,  # share of broken records that stops the run
    shapes=dict(  # the built-in world
      size=20_000,  # records per type
      seed=0,
      split="train",
      long_captions=0.25,  # share of captions that describe every object
      named_colors=0.0,  # share of captions and texts whose first sentence names colors that its kind leaves open
      in_order=0.0,  # share of captions and texts that name objects from the top left, unless they say a relation
      large=0.5,  # share of the scenes of one or two different objects that hold a large one
      spread=0.5,  # most that a lone object lies from the middle, of the side of the picture; 0.5: anywhere
      tags=None,  # share of each kind of scene; None: those of jflow/world
      asked=(),  # (kind of question, weight) pairs, as (("relation", 4.0),): jflow/world/questions.py
    ),
  )
  c.compute = dict(
    dtype="bfloat16",  # of activations and matmuls; masters are float32
    remat="auto",  # "none", "full", "dots", "save:attended,gate,up,...": what is kept; auto: as much as fits the memory
    attention="auto",  # of packed rows: "xla", "cudnn", "triton", "packed", "splash"; auto: by device
    matmul="dtype",  # of the LLM's blocks; "fp8": in 8 bits (GPU from compute capability 8.9); not in the paper
    unroll=1,  # LLM layers per iteration of the scan; remat="auto" takes all where a GPU keeps everything
    memory_gib=0.0,  # of a device that a step may use, GiB, in place of what it has; 0: as much as it has
    compilation_cache="~/.cache/jflow",  # compiled programs, reused by a restart; empty: none
  )
  c.mesh = dict(data=1, fsdp=1, model=1)  # the product is the number of devices of all processes
  c.distributed = dict(  # for training with several processes
    cluster="",  # "auto": jax reads Slurm, TPU pod (also GKE) or Open MPI; "": the three fields below
    coordinator="",  # HOST:PORT of process 0
    processes=1,
    process_id=0,
    start_seconds=300,  # for all processes to connect
    heartbeat_seconds=30,  # without a heartbeat after which a process counts as dead, and the others end too
  )
  c.checkpoint = dict(
    interval=1000,  # steps between saves
    keep=3,  # newest steps to retain
    keep_every=0,  # steps that are a multiple of it are retained for good; 0: none
  )
  c.profile = dict(start=0, steps=0)  # a trace of so many steps from that one on, into workdir/profile; 0: none
  c.log = dict(
    every_seconds=10.0,  # between lines where there is no terminal
    tensorboard=False,  # scalars and sample pictures into workdir/tensorboard; needs the package tensorboard
    wandb="",  # project of Weights & Biases that gets the same; needs the package wandb; empty: none
    sample_every=0,  # steps between sample pictures (workdir/samples); one device holds the weights twice; 0: none
    sample_prompts=(),  # empty: captions of the data, held-out ones where there are any
  )
  c.world = dict(  # fits of fresh parameters in place of pretraining; data.shapes has the built-in world's records
    fit_labels=0,  # labelled pictures of it to fit a fresh SigLIP to; 0: it stays fresh
    fit_images=300,  # pictures of the run's data to fit a fresh closed-form codec to
  )
  sizes[size](c)
  return c


# Parameters that the stages train and freeze, by the first part of their paths.
NEW_PARTS = (  # linear aligners, g_enc, g_dec, REPA head (paper section 3.3)
  "understanding_projector",
  "understanding_start",
  "generation_encoder",
  "generation_projector",
  "generation_output_norm",
  "generation_output_projector",
  "generation_decoder",
  "alignment_head",
)
SIGLIP = ("understanding_encoder/(?!head).*",)
NEVER = ("understanding_encoder/head", "vae")  # the pooling head is carried along unused; the VAE is frozen
