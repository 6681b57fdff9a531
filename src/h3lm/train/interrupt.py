"""A run that is asked to end: by Ctrl-C, or by a machine that wants its place back."""

import signal
import threading
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from h3lm.train.processes import largest, world_size


class RunStopped(Exception):
    """A signal has ended the run before its time.

    Attributes:
        status: The exit status that says so, 128 and the signal's number.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.status = 128 + signal_number


class StopOnSignal(TrainerCallback):
    """SIGINT and SIGTERM end the run behind the step at hand, with a checkpoint if it writes any.

    A second Ctrl-C ends it at once. (Of several processes it doesn't: `torchrun` repeats what the
    terminal has told them already, and kills those that take longer than its patience.)
    """

    def __init__(self) -> None:
        self.received = 0
        self.agreed = 0  # what some process has received
        self._before: dict[int, Any] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Listen; only the main thread can."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        if world_size() == 1:
            self.close()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Stop, all processes behind the same step."""
        self.agreed = largest(self.received)
        if self.agreed:
            control.should_training_stop = True
            control.should_save |= args.save_strategy != SaveStrategy.NO

    def close(self) -> None:
        """Leave signals to whom they belonged before."""
        while self._before:
            signal.signal(*self._before.popitem())
