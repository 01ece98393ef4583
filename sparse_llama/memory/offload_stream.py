"""Copies beside the computation: on a stream of their own on a CUDA device, at once anywhere else."""

import torch


class Copied:
    """A copy that is over when its event is; at once without one."""

    def __init__(self, event: torch.cuda.Event | None = None) -> None:
        self._event = event

    def wait(self) -> None:
        """Order what the current stream does next after the copy."""
        if self._event is not None:
            self._event.wait()

    def abandon(self) -> None:
        """The same: memory freed after this may be given away on the current stream."""
        self.wait()


class SideStream:
    """One stream per engine, made when a CUDA tensor comes."""

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None

    def behind_computation(self, device: torch.device) -> torch.cuda.Stream:
        """Return the stream, ordered after all that the current one has been given so far."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        # Also when memory is written to: it is the current stream's, which may not be done with its last use.
        self._stream.wait_stream(torch.cuda.current_stream(device))
        return self._stream

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> Copied:
        """Start to copy between the devices of both; they must live until the copy is over."""
        device = target.device if target.is_cuda else source.device
        if device.type != "cuda":
            target.copy_(source)
            return Copied()
        stream = self.behind_computation(device)
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
            event = torch.cuda.Event()
            event.record(stream)
        return Copied(event)
