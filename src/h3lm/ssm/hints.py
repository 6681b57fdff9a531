"""What an SSM module wants from those who train and store it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

SSM_MAX_LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class ParameterHint:
    """How an optimiser should treat one parameter.

    Attributes:
        max_learning_rate: Upper bound of the parameter's learning rate; None for the common one.
        weight_decay: The parameter's own weight decay; None for the common one.
    """

    max_learning_rate: float | None = None
    weight_decay: float | None = None


SSM_HINT = ParameterHint(max_learning_rate=SSM_MAX_LEARNING_RATE, weight_decay=0.0)


class SSMModule(nn.Module):
    """A module whose parameters stay in float32 (or float64) and carry training hints.

    The hints belong to the class, not to the parameter objects: loading, sharding and
    quantising replace those objects, and an attribute on them would silently be lost.

    `training_hints` maps the names of this module's own parameters to `ParameterHint`;
    a parameter that is not named there is treated like any other of the model.
    """

    training_hints: ClassVar[dict[str, ParameterHint]] = {}

    def reset_parameters(self) -> None:
        """Draw the parameters anew; a module without parameters has nothing to draw."""

    def check_precision(self) -> None:
        """Check that no mixed-precision policy has narrowed the parameters on their way here.

        Raises:
            TypeError: if FSDP, say, gathered them in half precision.
        """
        for name, parameter in self.named_parameters(recurse=False):
            if parameter.dtype.itemsize < 4:
                raise TypeError(
                    f"{type(self).__name__}.{name} is used in {parameter.dtype}: a mixed-precision "
                    "policy narrowed it, and a decay in half precision is another model. Shard "
                    "with h3lm.train.parallel.shard_model, which keeps SSMs in float32"
                )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SSMModule":
        # `.to(torch.bfloat16)`, `.half()` and the like move the module but never narrow it: a
        # decay rounded to 8 bits is another model, and rounding it back would not undo that.
        def keep_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            narrowed = moved.is_floating_point() and moved.dtype.itemsize < 4
            if narrowed and tensor.dtype.itemsize >= 4:
                return tensor.to(moved.device)
            return moved

        return super()._apply(keep_precision, recurse)
