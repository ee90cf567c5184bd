"""Rows read, encoded and packed while training goes on, in lanes.

A run has as many lanes as its global batch has rows, whatever the layout: lane l makes row l of every global batch, from blocks of the
files that no other lane reads. So a rank reads only what its own rows need, the rows are the same for any number of ranks and of
worker processes, and where a lane stands is a handful of numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import tokenizers

from megatron_swift.data.blocks import Blocks, Item, cut
from megatron_swift.data.chunks import Fault, encode_rows, encoder, refusal
from megatron_swift.data.messages import to_conversation
from megatron_swift.data.options import DataOptions, check_options
from megatron_swift.data.order import permutation
from megatron_swift.data.packing import pack
from megatron_swift.data.registry import Fixup, Identity
from megatron_swift.data.remote import content_of
from megatron_swift.data.sources import UNWANTED, Source, fixed
from megatron_swift.data.stamps import hash_values
from megatron_swift.data.tokenizer import Tokenizer
from megatron_swift.data.types import Conversation, Sample
from megatron_swift.utils.errors import DataError
from megatron_swift.utils.log import get_logger

STREAM_VERSION = 2  # raise it when the same input gives other rows
BLOCKS_PER_LANE = 8  # at least, where the files are long enough
FIRST_WINDOW = 64  # rows of a lane's first window, doubled from one to the next, so that training can begin soon
WINDOW_BYTES = 1 << 24  # of text: a window ends there, however few its rows
SKIP_HINT = "use --strict false to leave such rows out"
SAID = 3  # rows left out that are shown, for each lane's process


@dataclass(frozen=True, kw_only=True)
class Stream:
    """All that a rank needs in order to read its lanes. May be sent to another process.

    sets        : the data sets to draw from; one that holds all of them where no probabilities are given.
    window      : rows that each lane holds to shuffle and to pack, its first windows aside, which are smaller.
    fingerprint : of data, options and number of lanes.
    """

    sets: tuple[Blocks, ...]
    tokenizer: Tokenizer
    options: DataOptions
    window: int
    lanes: int
    fingerprint: str

    @property
    def num_bytes(self) -> int:
        """Bytes of all files."""
        return sum(part.stamp.size for blocks in self.sets for part in blocks.parts)


def open_stream(
    sources: Sequence[Source], tokenizer: Tokenizer, options: DataOptions, *, window: int, lanes: int
) -> Stream:
    """The stream over these files. Reads nothing but their sizes, the ends of Parquet files, and the files that are no lines of text."""
    check_options(options)
    groups = [list(sources)] if options.interleave_prob is None else [[source] for source in sources]
    sets = tuple(cut(group, at_least=BLOCKS_PER_LANE * lanes) for group in groups)
    for group, blocks in zip(groups, sets, strict=True):
        if not len(blocks):
            names = " ".join(source.request.value for source in group)
            raise DataError(f"--dataset {names} has no usable row", why="it is empty")
    fingerprint = _fingerprint(sets, tokenizer, options, window, lanes)
    return Stream(sets=sets, tokenizer=tokenizer, options=options, window=window, lanes=lanes, fingerprint=fingerprint)


def _fingerprint(sets: Sequence[Blocks], tokenizer: Tokenizer, options: DataOptions, window: int, lanes: int) -> str:
    parts = [part for blocks in sets for part in blocks.parts]
    names = ("system", "max_length", "truncation", "loss_scale", "packing", "strict")
    known = {
        **{name: getattr(options, name) for name in names},
        "template": repr(options.template),
        "identity": repr(Identity(options.model_name, options.model_author)),
        "columns": list(options.columns.items()),
        "seed": options.data_seed,
        "shuffle": options.dataset_shuffle,
        "probabilities": options.interleave_prob,
        "window": window,
    }
    everything = {
        "stream": STREAM_VERSION,
        "files": [[part.file.suffix.lower(), part.stop, *content_of(part.file)] for part in parts],
        "sizes": [[blocks.size, blocks.rows, blocks.starts] for blocks in sets],
        "tokenizer": [tokenizer.fingerprint(), tokenizers.__version__],
        "options": known,
        "lanes": lanes,
    }
    return f"stream-{hash_values(everything)}"


class Ref(NamedTuple):
    """Where a sample comes from: the data set, the lane's how-manieth block of it, the row there, the piece of that row."""

    set: int
    block: int
    row: int
    piece: int


@dataclass(frozen=True)
class Place:
    """Where a lane stands: at pack `next` of the window that began at `at`. Plain values, for a checkpoint.

    window : how many windows came before.  draws: how often a data set was drawn before it.
    at     : for each data set the (block, row) to go on with.  held: samples kept over from the window before.
    """

    window: int
    draws: int
    at: tuple[tuple[int, int], ...]
    held: tuple[Ref, ...]
    next: int = 0

    def as_json(self) -> dict[str, Any]:
        """The place as JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Place:
        """What `as_json` gave; KeyError or TypeError for anything else."""
        at = tuple((int(block), int(row)) for block, row in value["at"])
        return cls(value["window"], value["draws"], at, tuple(Ref(*ref) for ref in value["held"]), value["next"])


class _Kept(NamedTuple):
    ref: Ref
    sample: Sample


def _copied(sample: Sample) -> Sample:
    """The sample by itself: as a view it would keep its whole window in memory."""
    weights = sample.weights.copy() if sample.weights is not None else None
    return Sample(sample.ids.copy(), sample.labels.copy(), weights)


class Lane:
    """Row after row for one place in the global batch, without end. `place` is where the next row will come from."""

    def __init__(self, stream: Stream, number: int, place: Place | None = None) -> None:
        self.stream, self.number, self.options = stream, number, stream.options
        assert not isinstance(self.options.template, str)
        self._encoder = encoder(self.options, self.options.template, stream.tokenizer)
        self._identity = Identity(self.options.model_name, self.options.model_author)
        self._columns = tuple(self.options.columns.items())
        self.place = place or Place(0, 0, ((0, 0),) * len(stream.sets), ())
        self.left_out = 0
        self._packs: list[list[_Kept]] | None = None
        self._readers: list[_Reader] = []

    def __next__(self) -> list[Sample]:
        """The samples of the next row. DataError names file and line of a row that is malformed, where rows must not be."""
        if self._packs is None:
            held = self._again(self.place.held)
            self._open_window(self.place, held)
        begun = self.place.at[0][0]
        while self.place.next >= len(self._packs or ()):
            if self._after.at[0][0] - begun > 2 * len(self.stream.sets[0]) and not self._over:
                raise DataError("no row of the data set is left to train on", do="look at the reasons above")
            self._open_window(self._after, self._over)
        assert self._packs is not None
        row = self._packs[self.place.next]
        self.place = replace(self.place, next=self.place.next + 1)
        return [kept.sample for kept in row]

    def _open_window(self, place: Place, held: list[_Kept]) -> None:
        """Read, encode and pack the window that begins at `place`, and note where the one after it does."""
        rows, draws, at = self._read(place)
        fresh = self._encode(rows)
        if self.options.dataset_shuffle:
            order = permutation(len(fresh), self.options.data_seed, 0, self.number, place.window)
            fresh = [fresh[index] for index in order]
        everything, self._over = [*held, *fresh], []
        self._packs = [[kept] for kept in everything]
        if self.options.packing and everything:
            assert self.options.max_length is not None
            lengths = [len(kept.sample.ids) for kept in everything]
            groups = pack(lengths, self.options.max_length, window=len(lengths))
            last = [everything[index] for index in groups.pop()]  # not full: more may fit with what comes next
            self._over = [kept._replace(sample=_copied(kept.sample)) for kept in last]
            self._packs = [[everything[index] for index in group] for group in groups]
        self.place = place
        self._after = Place(place.window + 1, draws, at, tuple(kept.ref for kept in self._over))

    def _read(self, place: Place) -> tuple[list[tuple[Ref, Item, Fixup]], int, tuple[tuple[int, int], ...]]:
        """The window's rows, and how many draws and which rows are behind it then."""
        if [reader.at for reader in self._readers] != list(place.at):  # else they stand in the middle of their blocks
            self._readers = [_Reader(self, number, at) for number, at in enumerate(place.at)]
        rows: list[tuple[Ref, Item, Fixup]] = []
        draws, size = place.draws, 0
        wanted = min(self.stream.window, FIRST_WINDOW << min(place.window, 32))
        while len(rows) < wanted and size < WINDOW_BYTES:
            row = next(self._readers[self._draw(draws)])
            draws += 1
            size += row[1].size
            rows.append(row)
        return rows, draws, tuple(reader.at for reader in self._readers)

    def _draw(self, number: int) -> int:
        """Which data set gives the lane's row `number`: a function of seed, lane and number."""
        probabilities = self.options.interleave_prob
        if probabilities is None:
            return 0
        raw = np.random.PCG64(np.random.SeedSequence([self.options.data_seed, 1, self.number, number])).random_raw()
        return min(int(np.searchsorted(np.cumsum(probabilities), raw / 2.0**64, side="right")), len(probabilities) - 1)

    def _encode(self, rows: Sequence[tuple[Ref, Item, Fixup]]) -> list[_Kept]:
        """The samples of the rows; what cannot be used is left out, or raised where rows must be good."""
        found, faults = encode_rows(enumerate(partial(self._conversation, *row[1:]) for row in rows), self._encoder)
        for fault in faults:
            if fault.kind != UNWANTED:
                self._leave_out(rows[fault.number][1], fault)
        return [
            _Kept(rows[number][0]._replace(piece=piece), sample)
            for number, samples in found
            for piece, sample in enumerate(samples)
        ]

    def _conversation(self, item: Item, fixup: Fixup) -> Conversation:
        return to_conversation(fixed(fixup, item.make(), self._identity), columns=self._columns)

    def _leave_out(self, item: Item, fault: Fault) -> None:
        do = refusal(fault, self.options, skip=SKIP_HINT)
        if do is not None:
            raise DataError(f"{item.where()}: {fault.text}", do=do)
        self.left_out += 1
        if self.left_out <= SAID:
            more = ", …" if self.left_out == SAID else ""
            get_logger().warning("left out %s: %s%s", item.where(), fault.text, more)

    def _again(self, refs: Sequence[Ref]) -> list[_Kept]:
        """The samples of these places, read anew."""
        rows: list[tuple[Ref, Item, Fixup]] = []
        readers: dict[tuple, _Reader] = {}
        for ref in sorted({ref._replace(piece=0) for ref in refs}):  # a block is read once
            reader = readers.setdefault(ref[:2], _Reader(self, ref.set, (ref.block, 0)))
            row = next(reader)
            while row[0] != ref:
                row = next(reader)
            rows.append(row)
        samples = {kept.ref: kept for kept in self._encode(rows)}
        return [samples[ref] for ref in refs]


class _Reader:
    """The rows of one data set in the order of a lane, from `at` = (the lane's how-manieth block, row in it) on."""

    def __init__(self, lane: Lane, number: int, at: tuple[int, int]) -> None:
        self.lane, self.number, self.at = lane, number, at
        self.blocks = lane.stream.sets[number]
        self._rows: Iterator[tuple[Item, Fixup]] | None = None
        self._order: tuple[int, np.ndarray] | None = None

    def __next__(self) -> tuple[Ref, Item, Fixup]:
        for _ in range(2 * len(self.blocks) + 2):
            block, row = self.at
            if self._rows is None:
                self._rows = self.blocks.read(self._which(block))
                for _ in range(row):
                    next(self._rows)
            found = next(self._rows, None)
            if found is not None:
                self.at = (block, row + 1)
                return (Ref(self.number, block, row, 0), *found)
            self.at, self._rows = (block + 1, 0), None
        files = ", ".join(str(part.file) for part in self.blocks.parts[:3])
        raise DataError("the data set has no row", do=f"look into {files}")

    def _which(self, turn: int) -> int:
        """The block that comes at the lane's turn. Each pass takes all blocks, in an order of its own, by all lanes in turn.

        Without shuffling, each pass begins one block further on, so that a lane does not see the same blocks for ever.
        """
        options = self.lane.options
        epoch, index = divmod(turn * self.lane.stream.lanes + self.lane.number, len(self.blocks))
        if not options.dataset_shuffle:
            return (index + epoch) % len(self.blocks)
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, permutation(len(self.blocks), options.data_seed, 2, epoch)
        return int(self._order[1][index])
