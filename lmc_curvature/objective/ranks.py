"""Processes that share the batches of every pass, under `torchrun`: each computes on its share, and all get the sums.

A rank that fails says so in the store of the process group, where the others look after every batch; one that vanishes
gives no more sign of life. Either way the others end with an error, and no collective operation is begun before every
rank has come to it.
"""

import contextlib
import itertools
import json
import threading
import time
import warnings
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DistributedSampler

from lmc_curvature.averages import GroupMeans, grouped
from lmc_curvature.errors import LoaderError, OptionError, RankError

if TYPE_CHECKING:
    Group = dist.ProcessGroup | Literal["world"] | None
else:
    # Some builds of torch have no process groups.
    Group = Any
"""The processes that share the batches: a process group, `"world"` for all, or None for this process alone."""

_T = TypeVar("_T")
# A rank shows so often within the timeout that it lives; without a sign for this part of it, it is taken for lost, and
# the rest is for the others to notice.
_SIGNS, _LOST = 8, 0.7
_CPU = torch.device("cpu")
_PAUSES = (0.0005, 0.02)
# Objectives made so far for each group: the same number on every rank, as long as all make the same calls.
_made: Counter[str] = Counter()


class Ranks:
    """The processes that share the batches of an objective's passes; by default one process alone.

    All of them make the same calls with the same arguments.

    Args:
        group: A process group, or `"world"`; None for this process alone.
        timeout: Seconds after which a rank that gives no sign of life has ended the others.
        device: The device that is computed on.

    Attributes:
        rank: This process's number among them.
        size: Their number.

    Raises:
        OptionError: `group` is neither, torch.distributed has not been initialised, this process is not in the group,
            the group cannot reduce what is on the device, or `timeout` is not positive.
    """

    def __init__(self, group: Group = None, timeout: float | int = 60.0, device: torch.device = _CPU):
        self._group = _checked_group(group, timeout, device)
        self.rank, self.size = (
            (0, 1) if group is None else (dist.get_rank(self._group), dist.get_world_size(self._group))
        )
        if self.size > 1:
            self._timeout, self._meetings = timeout, itertools.count()
            self._store = _store_of(self._group)
            self._seen = _watch_life(self, self._store, timeout / _SIGNS)

    def has(self, index: int) -> bool:
        """Whether the batch at a place of the loader is this rank's to compute on."""
        return index % self.size == self.rank

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Within the block, an exception on this rank ends the others, too."""
        try:
            yield
        except BaseException as error:
            if self.size > 1 and not isinstance(error, RankError):
                said = f"Rank {self.rank} of {self.size} failed: {type(error).__name__}: {error}"
                with contextlib.suppress(RuntimeError):
                    self._store.set("failure", json.dumps(said))
            raise

    def check(self) -> None:
        """See whether another rank has failed or vanished.

        Raises:
            RankError: One has; the message is that of its exception.
        """
        if self.size == 1:
            return
        if self._asked("check", ["failure"]):
            raise RankError(json.loads(self._asked("get", "failure")))
        for rank, since in self._seen.items():
            if time.monotonic() - since > _LOST * self._timeout:
                raise RankError(
                    f"Rank {rank} of {self.size} gives no sign of life: was it killed? All ranks of a group make the "
                    f"same calls; they wait timeout={self._timeout:g} s for each other."
                )

    def gather(self, value: _T) -> list[_T]:
        """Every rank's value, in the order of ranks.

        Raises:
            RankError: A rank has failed or vanished.
        """
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        self._meet()
        with _naming_loss():
            dist.all_gather_object(found, value, group=self._group)
        return found

    def merge(self, groups: Sequence[GroupMeans]) -> list[GroupMeans]:
        """Every rank's batches, or groups of them, in the order of the loader; see `grouped`.

        Raises:
            RankError: A rank has failed or vanished.
        """
        return grouped(itertools.chain.from_iterable(self.gather(groups)))

    def total(self, weight: float, *sums: Tensor) -> float:
        """The weight of all ranks' batches; each tensor is replaced by the sum of theirs, the same on all.

        Raises:
            RankError: A rank has failed or vanished.
        """
        weight = sum(self.gather(weight))
        if self.size > 1:
            with _naming_loss():
                for tensor in sums:
                    dist.all_reduce(tensor, group=self._group)
        return weight

    def _meet(self) -> None:
        """Wait for every rank to come here: collective operations wait for lost ones far longer, or for ever."""
        number = next(self._meetings)
        # Of the meeting before, everybody has at least come here.
        self._asked("delete_key", f"meeting {number - 2} of {self.rank}")
        self._asked("set", f"meeting {number} of {self.rank}", "")
        absent = set(range(self.size)) - {self.rank}
        pauses = itertools.chain((_PAUSES[0] * 2**n for n in range(5)), itertools.repeat(_PAUSES[1]))
        while True:
            absent = {rank for rank in absent if not self._asked("check", [f"meeting {number} of {rank}"])}
            if not absent:
                return
            self.check()
            time.sleep(next(pauses))

    def _asked(self, name: str, *args: Any) -> Any:
        """What the group's store answers.

        Raises:
            RankError: The process that holds it is gone.
        """
        with _naming_loss():
            return getattr(self._store, name)(*args)


def yields_a_share(loader: Any, ranks: Ranks) -> bool:
    """Whether a loader yields another share of the data on every rank, by a `DistributedSampler`.

    Raises:
        LoaderError: Its shares are for other ranks.
    """
    samplers = getattr(loader, "sampler", None), getattr(getattr(loader, "batch_sampler", None), "sampler", None)
    sampler = next((each for each in samplers if isinstance(each, DistributedSampler)), None)
    if sampler is None or ranks.size == 1:
        return False
    if (sampler.rank, sampler.num_replicas) != (ranks.rank, ranks.size):
        raise LoaderError(
            f"The loader's DistributedSampler is for rank {sampler.rank} of {sampler.num_replicas}, and this is rank "
            f"{ranks.rank} of {ranks.size}: make it for the process group that is given as group."
        )
    examples = len(sampler.dataset)  # pyright: ignore[reportArgumentType]
    if sampler.total_size > examples:
        warnings.warn(
            f"The loader's DistributedSampler repeats {sampler.total_size - examples} of {examples} examples, so that "
            "every rank has as many, and these count twice: leave it out, and every rank takes its share of the same "
            "batches.",
            stacklevel=4,
        )
    return True


def _checked_group(group: Group, timeout: float | int, device: torch.device) -> "dist.ProcessGroup | None":
    if not timeout > 0:
        raise OptionError(f"timeout={timeout!r}: expected a positive number of seconds.")
    if group is None:
        return None
    if not (dist.is_available() and dist.is_initialized()):
        raise OptionError(
            f"group={group!r}: torch.distributed is not initialised. Start the program with torchrun, and call "
            "torch.distributed.init_process_group() first; or leave group out, to compute in this process alone."
        )
    if group == dist.GroupMember.NON_GROUP_MEMBER:
        raise OptionError("This process is not in the process group that was given as group.")
    if group != "world" and not isinstance(group, dist.ProcessGroup):
        raise OptionError(f"group={group!r}: expected a process group of torch.distributed, 'world', or None.")
    found = dist.group.WORLD if group == "world" else group
    if dist.get_backend(found) == "nccl" and device.type != "cuda":
        raise OptionError(
            f"The process group reduces by NCCL, which knows CUDA devices alone, and the computation is on {device}: "
            "make the group with backend='gloo', or compute on a GPU."
        )
    return found


def _store_of(group: "dist.ProcessGroup | None") -> Any:
    """A part of the store that a group was made with, for one objective."""
    # Some builds of torch have none.
    from torch.distributed import distributed_c10d as c10d

    name = getattr(group, "group_name", "")
    number, _made[name] = _made[name], _made[name] + 1
    return c10d.PrefixStore(f"lmc_curvature/{name}/{number}", c10d._get_default_store())


def _watch_life(ranks: Ranks, store: Any, interval: float) -> dict[int, float]:
    """Show the others now and then that this rank lives, for as long as the ranks are used; and look after them.

    Returns:
        When each of the others was last seen to live. It is kept up to date.
    """
    over, rank, others = threading.Event(), ranks.rank, set(range(ranks.size)) - {ranks.rank}
    seen = dict.fromkeys(others, time.monotonic())

    def watch() -> None:
        signs = dict.fromkeys(others, b"")
        with contextlib.suppress(RuntimeError):
            for sign in itertools.count():
                store.set(f"life of {rank}", str(sign))
                for other, before in signs.items():
                    key = f"life of {other}"
                    if store.check([key]) and (found := store.get(key)) != before:
                        signs[other], seen[other] = found, time.monotonic()
                if over.wait(interval):
                    return

    weakref.finalize(ranks, over.set)
    threading.Thread(target=watch, name="lmc_curvature ranks", daemon=True).start()
    return seen


@contextlib.contextmanager
def _naming_loss() -> Iterator[None]:
    """Say of an error of torch.distributed what it means."""
    try:
        yield
    except RankError:
        raise
    except RuntimeError as error:
        first = str(error).strip().partition("\n")[0]
        raise RankError(
            f"The connection to another rank was lost: was it killed? (torch.distributed: {first})"
        ) from error
