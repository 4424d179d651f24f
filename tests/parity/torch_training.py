"""Training of both families in plain PyTorch, for comparison: losses, gradients and AdamW steps.

Written from the papers, sample by sample, in float32 and without packing: every sample of a row runs through the LLM
alone. The parameters are jflow's own by path ("language_model/embed"); what encoders that are frozen make (posteriors,
codes) and the draws of a step are given.

Legend: n tokens of a sample, P patches, D embed, C channels, h w latents.
"""

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

torch.set_num_threads(1)  # small products
READ, WRITE = 1, 2  # values of image_kind


class Model:
  """The losses of a model under a flat dict of parameters, of which `trained` are leaves with gradients."""

  def __init__(self, config: dict[str, Any], params: dict[str, np.ndarray], trained: set[str]):
    self.c = config
    self.params = {path: torch.tensor(x, requires_grad=path in trained) for path, x in params.items()}
    self.trained = {path: self.params[path] for path in sorted(trained)}

  # --- maps ----------------------------------------------------------------------------------------------

  def _get(self, path: str, layer: int | None = None) -> torch.Tensor:
    return self.params[path] if layer is None else self.params[path][layer]

  def _linear(self, path: str, x: torch.Tensor, layer: int | None = None) -> torch.Tensor:
    y = x @ self._get(f"{path}/kernel", layer)
    return y + self._get(f"{path}/bias", layer) if f"{path}/bias" in self.params else y

  def _rms(self, path: str, x: torch.Tensor, epsilon: float, layer: int | None = None) -> torch.Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + epsilon) * self._get(f"{path}/scale", layer)

  def _layer_norm(self, path: str, x: torch.Tensor, layer: int | None = None) -> torch.Tensor:
    scale, bias = self._get(f"{path}/scale", layer), self._get(f"{path}/bias", layer)
    return F.layer_norm(x, x.shape[-1:], scale, bias, self.c["understanding_encoder"]["layer_norm_epsilon"])

  def _mlp(self, path: str, x: torch.Tensor, layers: int) -> torch.Tensor:
    """Linear maps with exact GELUs between them, as `path`/layers_K; a single one may be `path` itself."""
    if f"{path}/kernel" in self.params:
      return self._linear(path, x)
    for k in range(layers):
      x = self._linear(f"{path}/layers_{k}", F.gelu(x) if k else x)
    return x

  # --- parts ---------------------------------------------------------------------------------------------

  def llama(self, x: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """One sample [n, D] -> (hidden states after the last norm, the residual stream after each block)."""
    c = self.c["language_model"]
    n, width, group = len(x), c["head_dim"], c["num_heads"] // c["num_kv_heads"]
    frequency = c["rope_theta"] ** (-torch.arange(0, width, 2) / width)
    angle = positions[:, None].float() * frequency
    cos, sin = (torch.cat([f(angle)] * 2, -1)[:, None] for f in (torch.cos, torch.sin))
    rotate = lambda y: y * cos + torch.cat([-y[..., width // 2 :], y[..., : width // 2]], -1) * sin
    future = torch.triu(torch.ones(n, n, dtype=torch.bool), 1)
    streams = []
    for i in range(c["num_layers"]):
      linear = lambda name, y, i=i: self._linear(f"language_model/layers/{name}", y, i)
      y = self._rms("language_model/layers/attention_norm", x, c["rms_norm_epsilon"], i)
      q, k, v = (linear(f"attention/{name}", y).view(n, -1, width) for name in ("query", "key", "value"))
      q, k, v = rotate(q), rotate(k).repeat_interleave(group, 1), v.repeat_interleave(group, 1)
      logits = torch.einsum("qnh,knh->nqk", q, k) / math.sqrt(width)
      weights = logits.masked_fill(future, -math.inf).softmax(-1)
      x = x + linear("attention/output", torch.einsum("nqk,knh->qnh", weights, v).reshape(n, -1))
      y = self._rms("language_model/layers/mlp_norm", x, c["rms_norm_epsilon"], i)
      x = x + linear("mlp/down", F.silu(linear("mlp/gate", y)) * linear("mlp/up", y))
      streams.append(x)
    return self._rms("language_model/norm", x, c["rms_norm_epsilon"]), streams

  def siglip(self, pixels: torch.Tensor) -> torch.Tensor:
    """An image [H, W, 3] in [-1, 1] -> features [P, E]."""
    c = self.c["understanding_encoder"]
    s, heads = c["patch_size"], c["num_heads"]
    patches = pixels.unfold(0, s, s).unfold(1, s, s).permute(0, 1, 3, 4, 2).reshape(c["image_size"] ** 2 // s**2, -1)
    x = self._linear("understanding_encoder/patch_embed", patches) + self._get("understanding_encoder/position_embed")
    for i in range(c["num_layers"]):
      linear = lambda name, y, i=i: self._linear(f"understanding_encoder/layers/{name}", y, i)
      y = self._layer_norm("understanding_encoder/layers/attention_norm", x, i)
      q, k, v = (
        linear(f"attention/{name}", y).view(len(y), heads, -1).transpose(0, 1) for name in ("query", "key", "value")
      )
      attended = (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).softmax(-1) @ v
      x = x + linear("attention/output", attended.transpose(0, 1).reshape(len(y), -1))
      y = self._layer_norm("understanding_encoder/layers/mlp_norm", x, i)
      x = x + linear("mlp/contract", F.gelu(linear("mlp/expand", y)))
    return self._layer_norm("understanding_encoder/norm", x)

  def _convnext(self, path: str, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
    """A block on a map [h, w, C]; the condition [D] is the time's embedding."""
    kernel = self._get(f"{path}/depthwise_kernel").permute(2, 0, 1)[:, None]
    y = F.conv2d(x.permute(2, 0, 1)[None], kernel, self._get(f"{path}/depthwise_bias"), padding=3, groups=x.shape[-1])
    y = self._rms(f"{path}/norm", y[0].permute(1, 2, 0), self.c["generation"]["norm_epsilon"])
    y = F.gelu(self._linear(f"{path}/expand", y))
    norm = torch.sqrt((y * y).sum((0, 1)))
    norm = norm / (norm.mean() + self.c["generation"]["norm_epsilon"])
    response = f"{path}/response_norm"
    y = y * (1 + self._get(f"{response}/scale") * norm) + self._get(f"{response}/bias")
    x = x + self._linear(f"{path}/contract", y)
    scale, shift = self._linear(f"{path}/modulation", F.silu(condition)).chunk(2)
    return x * (1 + scale) + shift

  def encode(self, z: torch.Tensor, time: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """g_enc: z_t [h, w, C] at a time in [0, 1] -> (map, time embedding [D])."""
    g = self.c["generation"]
    frequency = torch.exp(-math.log(10_000.0) * torch.arange(g["channels"] // 2) / (g["channels"] // 2))
    angle = 1000 * time * frequency
    embedding = self._linear("generation_encoder/time_embed/expand", torch.cat([angle.cos(), angle.sin()]))
    embedding = self._linear("generation_encoder/time_embed/output", F.silu(embedding))
    s = g["patch_size"]
    x = z.unfold(0, s, s).unfold(1, s, s).permute(0, 1, 3, 4, 2).flatten(2)
    x = self._linear("generation_encoder/patch_embed", x)
    for i in range(g["encoder_blocks"]):
      x = self._convnext(f"generation_encoder/blocks_{i}", x, embedding)
    return x, embedding

  def velocity(self, hidden: torch.Tensor, skip: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
    """g_dec: the LLM's output at the patches [P, D] -> [h, w, C]."""
    g = self.c["generation"]
    x = self._rms("generation_output_norm", hidden, self.c["language_model"]["rms_norm_epsilon"])
    x = self._linear("generation_output_projector", x)
    x = self._rms("generation_decoder/input_norm", x, g["norm_epsilon"]).reshape(skip.shape)
    x = torch.cat([x, skip], -1)
    for i in range(g["decoder_blocks"]):
      x = self._convnext(f"generation_decoder/blocks_{i}", x, embedding)
    x = self._linear("generation_decoder/output", self._rms("generation_decoder/output_norm", x, g["norm_epsilon"]))
    return F.pixel_shuffle(x.permute(2, 0, 1)[None], g["patch_size"])[0].permute(1, 2, 0)

  # --- losses --------------------------------------------------------------------------------------------

  def losses(self, batch: dict[str, np.ndarray], draws: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """The losses of packed rows by name, each a mean: over tokens that carry loss, or over written images."""
    sums: dict[str, list[torch.Tensor]] = {}
    for row in range(len(batch["tokens"])):
      for segment in range(1, batch["segment_ids"][row].max() + 1):
        (where,) = np.nonzero(batch["segment_ids"][row] == segment)
        inside = lambda m: batch["image_kind"][row, m] and where[0] <= batch["image_start"][row, m] <= where[-1]
        images = [m for m in range(batch["image_kind"].shape[1]) if inside(m)]
        one = {name: torch.tensor(x[row][where]) for name, x in batch.items() if name in _TOKENS}
        for m in images:
          of_image = {name: torch.tensor(x[row, m]) for name, x in (batch | draws).items() if name in _IMAGES}
          one.setdefault("image", []).append(of_image | {"start": int(batch["image_start"][row, m] - where[0])})
        for name, terms in self._sample(one).items():
          sums.setdefault(name, []).extend(terms)
    return {name: torch.stack(terms).mean() for name, terms in sums.items()}

  def _sample(self, one: dict[str, Any]) -> dict[str, list[torch.Tensor]]:
    """The terms of each loss of one sample."""
    c, rows = self.c, self._get("language_model/embed")[one["tokens"].long()]
    written = []
    for image in one.get("image", ()):
      pixels = image["images"].float() / 127.5 - 1
      if image["image_kind"] == READ:
        seen = self._mlp("understanding_projector", self.siglip(pixels), c["reader"]["layers"])
        start = image["start"]
        if c["reader"]["start"] == "learned":
          seen, start = torch.cat([self._get("understanding_start")[None], seen]), start - 1
        slots, first = seen, start + 1
      else:
        slots, first, context = self._writing(image)
        written.append((first, context, pixels))
      rows = torch.cat([rows[:first], slots, rows[first + len(slots) :]])
    hidden, streams = self.llama(rows, one["positions"])
    terms: dict[str, list[torch.Tensor]] = {}
    if one["loss_mask"].any():
      logits = hidden[one["loss_mask"]] @ self._get("language_model/head/kernel")
      terms["text"] = list(F.cross_entropy(logits, one["targets"][one["loss_mask"]].long(), reduction="none"))
    for first, context, pixels in written:
      for name, value in self._written(hidden, streams, first, context, pixels).items():
        terms.setdefault(name, []).append(value)
    return terms

  def _writing(self, image: dict[str, Any]) -> tuple[torch.Tensor, int, Any]:
    """(slots, the position of the first, what the losses need) of an image to write."""
    c = self.c
    if c["generation"]["kind"] == "codes":
      codes = image["stored"].long()
      embedded = self._get("generation_embed/embed")[codes]
      slots = self._mlp("generation_projector", embedded, c["generation"]["projector_layers"])
      return slots, image["start"], codes
    mean, log_variance = image["stored"].float().chunk(2, -1)
    scale = c["autoencoder"]["scaling"]
    data = scale * mean + scale * torch.exp(log_variance / 2) * image["posterior"]
    time = image["time"]
    skip, embedding = self.encode(time * data + (1 - time) * image["noise"], time)
    slots = torch.cat([embedding[None], self._linear("generation_projector", skip.flatten(0, 1))])
    return slots, image["start"], (data - image["noise"], skip, embedding)

  def _written(self, hidden, streams, first: int, context: Any, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    """The losses of one written image."""
    if self.c["generation"]["kind"] == "codes":
      before = hidden[first - 1 : first - 1 + len(context)]  # a code is predicted one position earlier
      logits = self._linear("generation_head/output", F.gelu(self._linear("generation_head/hidden", before)))
      return {"codes": F.cross_entropy(logits, context)}
    target, skip, embedding = context
    patches = slice(first + 1, first + 1 + skip.shape[0] * skip.shape[1])
    velocity = self.velocity(hidden[patches], skip, embedding)
    losses = {"flow": ((velocity - target) ** 2).mean()}
    if head := self.c["objectives"].get("alignment"):
      x = streams[head["layer"] - 1][patches]
      for k in (1, 2, 3):
        x = self._linear(f"alignment_head/linear_{k}", F.silu(x) if k > 1 else x)
      losses["alignment"] = -F.cosine_similarity(x, self.siglip(pixels).detach(), dim=-1).mean()
    return losses


_TOKENS = ("tokens", "targets", "loss_mask", "positions")
_IMAGES = ("images", "image_kind", "stored", "time", "noise", "posterior")


class Trainer:
  """AdamW steps after clipping, at a rate that rises linearly in the warm-up."""

  def __init__(self, model: Model, optimizer: dict[str, Any], weights: dict[str, float]):
    self.model, self.given, self.weights, self.done = model, optimizer, weights, 0
    self.adamw = torch.optim.AdamW(
      model.trained.values(),
      lr=optimizer["learning_rate"],
      betas=(optimizer["beta1"], optimizer["beta2"]),
      eps=optimizer["epsilon"],
      weight_decay=optimizer["weight_decay"],
    )

  def step(self, batch: dict[str, np.ndarray], draws: dict[str, np.ndarray]) -> dict[str, float]:
    """Takes a step and returns the losses before it; the gradients stay in the parameters, before the clip in
    `norms`."""
    losses = self.model.losses(batch, draws)
    self.adamw.zero_grad()
    sum(self.weights[name] * value for name, value in losses.items() if self.weights.get(name)).backward()
    squares: dict[str, float] = {}
    for path, x in self.model.trained.items():
      part = path.split("/")[0]
      squares[part] = squares.get(part, 0.0) + (0.0 if x.grad is None else float((x.grad.double() ** 2).sum()))
    self.norms = {part: math.sqrt(value) for part, value in squares.items()}
    torch.nn.utils.clip_grad_norm_(self.model.trained.values(), self.given["clip_norm"])
    for group in self.adamw.param_groups:
      group["lr"] = self.given["learning_rate"] * min(1.0, (self.done + 1) / max(self.given["warmup_steps"], 1))
    self.adamw.step()
    self.done += 1
    return {name: value.item() for name, value in losses.items()}
