"""The protocol of a method of learning, in place of the losses on packed rows."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from jflow.data.tokenizer import Tokenizer
from jflow.models.unified import UnifiedModel
from jflow.training.state import TrainState


class Method(Protocol):
  """Data and step of a run; `jflow.rl.run` has two."""

  def open_data(self, tokenizer: Tokenizer, share: Sequence[int]) -> Any:
    """The data of steps, with the methods of `Pipeline` that a run calls. `share`: see `setup.open_data`."""

  def make_step(self, model: UnifiedModel, optimizer: Any, shardings: TrainState, options: Any) -> Callable[..., Any]:
    """The step (state, batch) -> (state, metrics), see `program.make_program`; it may raise `Unscored`."""
