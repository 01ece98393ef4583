"""Places of a given size that are used over and over, and free themselves."""

from collections.abc import Callable
from typing import Generic, Protocol, TypeVar


class Slot(Protocol):
    """A place for some bytes."""

    num_bytes: int


SlotT = TypeVar("SlotT", bound=Slot)


class Lease(Generic[SlotT]):
    """A slot in use; it is free again when nobody holds the lease, a copy under way included."""

    def __init__(self, slots: "Slots[SlotT]", slot: SlotT) -> None:
        self.slot = slot
        self._slots = slots

    def __del__(self) -> None:
        # A copying thread may be the last holder. append is atomic; a lock in a finalizer could be one that
        # the interrupted thread holds.
        self._slots.free.append(self.slot)


class Slots(Generic[SlotT]):
    """As many slots as were ever in use at once, none larger than the largest thing in it ever was."""

    def __init__(self, make: Callable[[int], SlotT]) -> None:
        self.free: list[SlotT] = []
        self.num_bytes = 0
        """Of all slots, in use or not."""
        self._make = make

    def take(self, num_bytes: int) -> Lease[SlotT]:
        """Return the smallest free slot of at least ``num_bytes``, else one in place of the largest free."""
        fitting = [slot for slot in self.free if slot.num_bytes >= num_bytes]
        if fitting:
            slot = min(fitting, key=lambda one: one.num_bytes)
            self.free.remove(slot)
            return Lease(self, slot)
        if self.free:
            too_small = max(self.free, key=lambda one: one.num_bytes)
            self.free.remove(too_small)
            self.num_bytes -= too_small.num_bytes
            del too_small  # its bytes go before the new ones come
        slot = self._make(num_bytes)
        self.num_bytes += num_bytes
        return Lease(self, slot)
