"""End the run at a loss or a gradient that is not finite, before it changes a weight."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.optim import Optimizer


class FiniteWatch:
    """Check whether losses and gradients are finite, without making the host wait for the device where that costs time.

    On a CPU each loss, and the norm of each gradient, is looked at before the optimizer's step. `late`, the device
    itself keeps the optimizer from changing anything from the first one on that is not finite (torch's fused optimizers
    have that for gradient scalers), and the host looks when the next update is under way: the device never idles for
    it.

    Args:
        optimizer: torch's own, `fused` where `late`.
        anywhere: of a flag [] on this process, how many processes have it; called on all of them together.
        late: see above. What `error` holds then stays in memory while the next update is computed.
    """

    def __init__(self, optimizer: Optimizer, anywhere: Callable[[Tensor], Tensor], *, late: bool) -> None:
        self._optimizer, self._anywhere, self.late = optimizer, anywhere, late
        self._bad: Tensor | None = None
        self._failed: Callable[[], Exception] | None = None

    def see(self, loss: Tensor, error: Callable[[], Exception]) -> None:
        """Check the loss of an update whose step is yet to come.

        Raises:
            Exception: what `error` of the first loss that is not finite gives, be it of this update or, `late`, of the
                one before.
        """
        # Torch's optimizers leave the weights alone at 1 exactly.
        bad = (self._anywhere((~torch.isfinite(loss.detach())).float()) > 0).float()
        if self.late:
            self.look()
            bad = bad if self._bad is None else torch.maximum(self._bad, bad)
            self._optimizer.found_inf = bad  # pyright: ignore[reportAttributeAccessIssue]
        self._bad, self._failed = bad, error
        if not self.late:
            self.look()

    def see_gradients(self, norms: Mapping[str, Tensor]) -> None:
        """Check the norms [] of the gradients of that loss, alike on all processes; its step is yet to come. A finite
        loss may have a gradient that is not.

        Raises:
            Exception: as `see`; `late`, when it is looked at next.
        """
        if norms and self._bad is not None:
            bad = (~torch.isfinite(torch.stack(list(norms.values())))).any().float()
            self._bad = torch.maximum(self._bad, bad.to(self._bad.device))
            if self.late:
                self._optimizer.found_inf = self._bad  # pyright: ignore[reportAttributeAccessIssue]
                return
            self.look()
        if not self.late:
            self._bad = self._failed = None  # it holds the batch

    def look(self) -> None:
        """Wait for the newest loss that was seen.

        Raises:
            Exception: as `see`.
        """
        if self._bad is not None and self._failed is not None and self._bad.item() > 0:
            raise self._failed()
