"""What a compiled program sends between devices, and how long its compiler thinks it takes, read
from its text."""

import math
import re
from collections import defaultdict

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BETWEEN_SLICES = "between slices"  # what leaves a chip over the data centre's network

_ITEMSIZE = {
    "pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "f64": 8,
}  # fmt: skip
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_COLLECTIVE = re.compile(rf" = (.*?) ({'|'.join(KINDS)})(-start)?\(")
_CALLED = re.compile(r"\b(?:calls|to_apply|condition)=%?([\w.\-]+)|branch_computations=\{([^}]*)\}")
_WHILE = re.compile(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_SEND = re.compile(r" = \((.*?\]).*\) send\(.*_xla_megascale_transfer_type")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_CHAIN = re.compile(r'chain_id="?\w+')
# {{0,1},{2,3}}, [2,2]<=[4] or mesh['a'=2,'b'=2] {'b'}
_GROUPS = re.compile(
    r"replica_groups=(?:\{\{([\d,]*)\}(?:,\{[\d,]*\})*\}|\[\d+,(\d+)\]"
    r"|mesh\[([^\]]*)\].*? \{('[\w',]*)\}|\{\})"
)
_TRIP_COUNT = re.compile(r"known_trip_count\D*(\d+)")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')


def _bytes(shapes: str) -> list[int]:
    """Of each array of a result type."""
    return [
        _ITEMSIZE.get(kind, 4) * math.prod(int(n) for n in dims.split(",") if n)
        for kind, dims in _ARRAY.findall(shapes)
    ]


def _group_size(groups: re.Match | None) -> int:
    """Devices that take part together; 1 where the text does not say."""
    if groups is None:
        return 1
    listed, size, mesh, axes = groups.groups()
    if mesh:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"\w+", axes))
    return int(size) if size else listed.count(",") + 1 if listed else 1


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Lines of every computation by its name, and the name of the entry."""
    bodies: dict[str, list[str]] = {}
    name, entry = "", ""
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            name = match[1]
            bodies[name] = []
            if line.startswith("ENTRY"):
                entry = name
        elif name:
            bodies[name].append(line)
    return bodies, entry


def _trips(line: str, condition: list[str]) -> int:
    """How often a loop runs: as the compiler noted it, or the bound that its condition has."""
    if match := _TRIP_COUNT.search(line):
        return int(match[1])
    bounds = [int(n) for c in condition for n in re.findall(r"s32\[\]\S* constant\((\d+)\)", c)]
    return max(bounds, default=1)


def _runs(bodies: dict[str, list[str]], entry: str, fused: bool) -> dict[str, int]:
    """How often each computation runs in one execution; `fused` ones too, or only loops' and
    conditionals'."""
    runs: dict[str, int] = defaultdict(int)
    waiting = [(entry, 1)]
    while waiting:
        name, times = waiting.pop()
        if times <= runs[name]:
            continue
        runs[name] = times
        for line in bodies.get(name, ()):
            if loop := _WHILE.search(line):
                condition, body = loop.groups()
                waiting.append((body, times * _trips(line, bodies.get(condition, []))))
            for called, branches in _CALLED.findall(line):
                if branches:
                    waiting += [(n, times) for n in re.findall(r"[\w.\-]+", branches)]
                elif fused:
                    waiting.append((called, times))
    return runs


def estimated_cycles(text: str) -> int:
    """Clock cycles of one execution on a device, by the cost model of a TPU's compiler, which notes
    them at every operation; 0 where it notes none. Own kernels and waiting for other devices are
    not in it.

    Args:
        text: `compiled.as_text()`.
    """
    bodies, entry = _computations(text)
    return sum(
        times * int(cycles)
        for name, times in _runs(bodies, entry, fused=False).items()
        for line in bodies.get(name, ())
        for cycles in _CYCLES.findall(line)
    )


def collectives(text: str) -> dict[str, tuple[int, int]]:
    """Collectives of one execution, by kind: how many, and bytes of the larger of operand and
    result on a device.

    Loops count as often as they run. A TPU compiler weaves one collective into several fusions,
    all with its channel and chain: it counts once. Of several slices it does a part within each,
    and what is left for the network between them it sends: `BETWEEN_SLICES`, on top of the parts.

    Args:
        text: `compiled.as_text()`.
    """
    bodies, entry = _computations(text)
    seen: dict[tuple[str, ...], tuple[int, int]] = {}
    for name, times in _runs(bodies, entry, fused=True).items():
        for i, line in enumerate(bodies.get(name, ())):
            if match := _SEND.search(line):
                seen[BETWEEN_SLICES, f"{name}:{i}"] = times, times * sum(_bytes(match[1]))
                continue
            match = _COLLECTIVE.search(line)
            if not match:
                continue
            shapes, kind, start = match.groups()
            groups = _GROUPS.search(line)
            sizes = _bytes(shapes.replace("u32[]", ""))  # a permute's counters
            size = sum(sizes)
            if start and kind != "all-reduce":  # operands, and then results
                half = len(sizes) // 2
                size = max(sum(sizes[:half]), sum(sizes[half:]))
            if kind == "reduce-scatter" and not start:
                size *= _group_size(groups)
            # The compiler's name says where a sum is scattered in the same breath.
            if "all-reduce-scatter" in name:
                kind = "reduce-scatter"
            channel, chain = _CHANNEL.search(line), _CHAIN.search(line)
            # JAX gives all that `shard_map` sends one channel, the first.
            if chain or (channel and channel[1] != "1" and kind != "collective-permute"):
                key = tuple(m[0] if m else "" for m in (channel, chain, groups))
            else:
                key = (f"{name}:{i}",)
            seen[kind, *key] = max(seen.get((kind, *key), (0, 0)), (times, times * size))
    totals: dict[str, tuple[int, int]] = {}
    for (kind, *_), (times, size) in seen.items():
        count, total = totals.get(kind, (0, 0))
        totals[kind] = (count + times, total + size)
    return totals
