"""What a run on many machines takes: nodes, objects and rates, each from a cost of this machine and a public figure.

The costs are those of one core (`unit_costs`), the public figures those below; both are shown beside each result, so
that it can be corrected for other machines.
"""

from __future__ import annotations

from dataclasses import dataclass

from rich.filesize import decimal

from ..base.errors import RecipeError
from ..store.shard_order import SHARD_BYTES as ORDER_BYTES
from ..store.shard_order import WINDOW
from ..store.shard_reader import INDEX_BYTES
from ..store.shard_readers import MOST_INDEX_BYTES
from .cost import Estimate
from .unit_costs import UnitCosts

PREPARE_SHARE = 0.8
"""Speed of `prepare` over that of the bare tokenizer."""
CORES_PER_GPU, NODE_MEMORY = 14, 2e12
"""NVIDIA DGX H100: 112 cores and 2 TB for 8 GPUs."""
LISTED_NAMES, REQUEST_SECONDS, CONNECTION_RATE, LIST_PRICE = 1000, 0.1, 85e6, 0.005 / 1000
"""Amazon S3: names per listing, seconds to the first byte (its guidelines say 0.1 to 0.2), bytes per second of one
connection, and dollars per listing (Standard)."""


@dataclass(frozen=True)
class LargeRun:
    """Stage one over all tokens, and reading and verification of the cache."""

    estimate: Estimate
    costs: UnitCosts
    nodes: int
    node_cores: int
    shards: int
    shard_rows: int
    corpus_size: float
    """Bytes of the rows on disk."""
    student_rate: float
    """Positions per second that a node trains on."""

    @classmethod
    def of(
        cls,
        estimate: Estimate,
        costs: UnitCosts,
        *,
        shard_rows: int,
        shards: int,
        corpus_size: float,
        nodes: int = 1,
        node_cores: int | None = None,
        student_rate: float = 200_000.0,
    ) -> LargeRun:
        """Raises RecipeError for GPUs that do not divide among the nodes, and for numbers that are not positive."""
        if min(nodes, node_cores or 1, student_rate) <= 0 or estimate.num_gpus % nodes:
            raise RecipeError(
                f"{estimate.num_gpus} GPUs, {nodes} nodes, {node_cores} cores, {student_rate} positions/s: give positive "
                "numbers, and as many GPUs as divide among the nodes"
            )
        node_cores = node_cores or CORES_PER_GPU * (estimate.num_gpus // nodes)
        return cls(estimate, costs, nodes, node_cores, shards, shard_rows, corpus_size, student_rate)

    @property
    def list_requests(self) -> int:
        """To list all names: a shard has its file and its record."""
        return -(-2 * self.shards // LISTED_NAMES)

    @property
    def prepare_hours(self) -> float:
        """On all cores of all nodes."""
        speed = self.costs.tokens_per_second * PREPARE_SHARE * self.node_cores * self.nodes
        return self.estimate.tokens / speed / 3600

    @property
    def node_rate(self) -> float:
        """Positions per second of one node's GPUs."""
        return self.estimate.tokens / (self.estimate.teacher_hours * 3600) / self.nodes

    @property
    def encoding_rate(self) -> float:
        """Positions per second that the cores of one node could encode and write."""
        return self.node_cores / self.costs.write_seconds

    @property
    def reader_memory(self) -> float:
        """Bytes: the order of the shards, and the places of the chunks of two windows."""
        places = 2 * WINDOW * self.shard_rows * self.costs.arrays * INDEX_BYTES
        return ORDER_BYTES * self.shards + min(places, MOST_INDEX_BYTES)

    @property
    def reader_disk(self) -> float:
        """Bytes of the copies of two windows, for caches on an object store."""
        return 2 * min(WINDOW, self.shards) * self.estimate.storage / self.shards

    @property
    def verify_core_hours(self) -> float:
        return self.estimate.storage / self.costs.verify_bytes_per_second / 3600

    @property
    def verify_hours_from_afar(self) -> float:
        """On the cores of one node, each with one connection."""
        rate = self.node_cores * min(CONNECTION_RATE, self.costs.verify_bytes_per_second)
        return self.estimate.storage / rate / 3600

    def to_json(self) -> dict[str, object]:
        names = ("list_requests", "prepare_hours", "node_rate", "encoding_rate", "reader_memory", "reader_disk")
        derived = {name: getattr(self, name) for name in (*names, "verify_core_hours", "verify_hours_from_afar")}
        given = {name: getattr(self, name) for name in ("nodes", "node_cores", "shards", "shard_rows", "student_rate")}
        return {**given, "corpus_bytes": self.corpus_size, **derived, "unit_costs": vars(self.costs)}

    def facts(self) -> dict[str, str]:
        """Quantity -> what it takes, what was measured here or counted, and the public figure, ready to print."""
        costs, cores = self.costs, f"{self.node_cores} cores"

        def stream(positions: float, seconds: float) -> str:
            rate = positions * self.estimate.storage / self.estimate.tokens
            return (
                f"{positions:,.0f} positions/s and {rate / 1e6:,.1f} MB/s a node, on {positions * seconds:,.1f} of {cores} "
                f"({seconds * 1e6:.1f} us a position) and {rate / CONNECTION_RATE:.2f} connections of "
                f"{CONNECTION_RATE / 1e6:.0f} MB/s (S3)"
            )

        return {
            "corpus": f"{decimal(round(self.corpus_size))} of packed rows, {self.corpus_size / self.estimate.tokens:.1f} bytes a "
            "position",
            "objects": f"{self.estimate.files:,}, {self.estimate.storage / self.shards / 1e6:,.0f} MB a shard",
            "a listing": f"{self.list_requests:,} requests, {self.list_requests * REQUEST_SECONDS:,.0f} s and "
            f"${self.list_requests * LIST_PRICE:,.3f} ({LISTED_NAMES:,} names, {REQUEST_SECONDS:g} s and ${LIST_PRICE:.6f} "
            "each on S3); readers of a finished cache make none",
            "prepare": f"{self.prepare_hours:,.2f} h on {self.nodes} x {cores} ({costs.tokens_per_second / 1e6:.2f} M "
            f"tokens/s a core of {costs.tokenizer}, {PREPARE_SHARE:g} of it; {CORES_PER_GPU} cores a GPU in a DGX H100)",
            "writing": f"{stream(self.node_rate, costs.write_seconds)}; its cores could encode "
            f"{self.encoding_rate:,.0f} positions/s",
            "reading": stream(self.student_rate, costs.read_seconds),
            "a reader": f"{self.reader_memory / 1e6:,.0f} MB of memory ({ORDER_BYTES} bytes a shard, {INDEX_BYTES} a chunk of "
            f"two windows; a DGX H100 has {NODE_MEMORY / 1e12:.0f} TB), from afar {self.reader_disk / 1e9:,.1f} GB of disk",
            "verify": f"{self.verify_core_hours:,.1f} core hours for the shards ({costs.verify_bytes_per_second / 1e6:,.0f} MB/s a core), "
            f"{self.verify_core_hours / self.node_cores:,.2f} h on all cores of a node; if each reads "
            f"{CONNECTION_RATE / 1e6:.0f} MB/s from S3, {self.verify_hours_from_afar:,.2f} h",
        }
