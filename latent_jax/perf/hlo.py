"""What a compiled program does, read from its own text: collectives, matmul FLOPs and memory traffic of one device.

The compilers' own cost analysis counts the body of a loop once; here every instruction counts as often as it runs. A
conditional counts as its branch with the most FLOPs.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Sequence

import numpy as np

BITS = {"pred": 8, "s4": 4, "u4": 4, "token": 0}  # every other name ends in its number of bits
COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute", "collective-broadcast")
# Read or write nothing by themselves.
FREE = ("parameter", "tuple", "get-tuple-element", "bitcast", "constant", "while", "conditional", "call", "iota")
_SHAPE = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_NAME = re.compile(r"%([\w.\-]+)")

Shape = tuple[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: `%name = shapes opcode(operands), attributes`."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    arguments: str
    attributes: str
    root: bool

    def attribute(self, key: str) -> str:
        """The computation that an attribute names; "" where there is no such attribute."""
        match = re.search(rf"\b{key}=%?([\w.\-]+)", self.attributes)
        return match[1] if match else ""


class Program:
    """A compiled module's computations, by name, and which of them is the entry."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry, current = "", {}
        for line in text.splitlines():
            if header := _HEADER.match(line):
                current = self.computations.setdefault(header[2], {})
                self.entry = header[2] if header[1] else self.entry
            elif " = " in line and line.startswith(" ") and (instruction := _instruction(line)):
                current[instruction.name] = instruction

    def walk(self) -> Iterator[tuple[Instruction, dict[str, Instruction], str, float, int]]:
        """(instruction, its computation, that one's name, times it runs in a step, loops around it)."""
        yield from self._walk(self.entry, 1.0, 0)

    def _walk(
        self, name: str, times: float, depth: int
    ) -> Iterator[tuple[Instruction, dict[str, Instruction], str, float, int]]:
        computation = self.computations.get(name, {})
        for instruction in computation.values():
            yield instruction, computation, name, times, depth
            if instruction.opcode == "while":
                yield from self._walk(instruction.attribute("body"), times * self.trips(instruction), depth + 1)
            elif instruction.opcode == "conditional":
                yield from self._walk(max(self.branches(instruction), key=self._flops), times, depth)
            else:
                for called in self.called(instruction):
                    yield from self._walk(called, times, depth)

    def called(self, instruction: Instruction) -> list[str]:
        """What a fusion, call or asynchronous start runs once."""
        keys = ("to_apply",) if instruction.opcode == "call" else ("calls", "called_computation")
        return [name for name in map(instruction.attribute, keys) if name in self.computations]

    def branches(self, conditional: Instruction) -> list[str]:
        if listed := re.search(r"branch_computations=\{([^}]*)\}", conditional.attributes):
            return _NAME.findall(listed[1])
        return [conditional.attribute("true_computation"), conditional.attribute("false_computation")]

    def trips(self, loop: Instruction) -> int:
        """Turns of a loop: what the compiler says, else the limit in its condition; 1 where neither is there."""
        if known := re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', loop.attributes):
            return int(known[1])
        condition = self.computations.get(loop.attribute("condition"), {})
        inner = [self.computations[name] for each in condition.values() for name in self.called(each)]
        limits = [
            int(each.arguments)
            for computation in (condition, *inner)
            for each in computation.values()
            if each.opcode == "constant" and each.arguments.isdigit()
        ]
        counters = [_index(each) for each in condition.values() if each.opcode == "get-tuple-element"]
        body = self.computations.get(loop.attribute("body"), {})
        result = next((each for each in body.values() if each.root), None)
        step = None
        if len(counters) == 1 and result and counters[0] < len(result.operands):
            step = self._added(result.operands[counters[0]], body)
        return -(-max(limits, default=1) // (step or 1))

    def _added(self, name: str, body: dict[str, Instruction]) -> int | None:
        """What a turn of a loop adds to a counter: the sum of constants between the body's parameter and `name`."""
        each = body.get(name)
        if each is None or each.opcode in ("parameter", "get-tuple-element"):
            return 0
        if each.opcode == "constant":
            return int(each.arguments) if each.arguments.isdigit() else None
        if each.opcode == "fusion":
            inner = self.computations[self.called(each)[0]]
            added = self._added(next(i.name for i in inner.values() if i.root), inner)
            outer = [self._added(operand, body) for operand in each.operands]
            return _total([added, *outer])
        if each.opcode not in ("add", "copy", "bitcast", "convert"):
            return None
        return _total([self._added(operand, body) for operand in each.operands])

    @functools.cache  # noqa: B019 - as long-lived as the program
    def _flops(self, name: str) -> float:
        return sum(times * flops(each, within) for each, within, _, times, _ in self._walk(name, 1.0, 0))


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective: bytes of the whole array (gathered, or before it is scattered) of one run, and how often it runs.

    group: devices that take part together; ids: partition ids of the first such group. source: the op it comes from.
    """

    kind: str
    bytes: int
    times: float
    loops: int
    group: int
    ids: tuple[int, ...]
    source: str

    @property
    def sent(self) -> float:
        """Bytes that a device sends in a step, by ring algorithms."""
        share = 1.0 if self.kind == "collective-permute" else (self.group - 1) / self.group
        return self.bytes * self.times * share * (2 if self.kind == "all-reduce" else 1)


def collectives(program: Program) -> list[Collective]:
    """Every collective of a step that moves something."""
    found, chains = [], set()
    for each, within, name, times, depth in program.walk():
        kind = each.opcode.removesuffix("-start")
        if kind not in COLLECTIVES:
            continue
        # TPU: a collective that runs beside several kernels stands in each of them, under one chain and channel.
        if chain := re.search(r'chain_id="(\d+)"', each.attributes):
            link = chain[1], re.findall(r"channel_id=(\d+)", each.attributes)[0]
            if link in chains:
                continue
            chains.add(link)
        ids = _group(each.attributes)
        size = sum(_bytes(within[operand].shapes) for operand in each.operands if operand in within)
        if kind == "all-gather":
            size *= len(ids)
        # TPU: an all-reduce whose result is cut up at once, in one fusion, is carried out as a reduce-scatter.
        if kind == "all-reduce" and "all-reduce-scatter" in name:
            kind = "reduce-scatter"
        source = re.search(r'op_name="([^"]*)"', each.attributes)
        if len(ids) > 1 or kind == "collective-permute":
            found.append(Collective(kind, int(size), times, depth, len(ids), ids, source[1] if source else each.name))
    return found


def total_flops(program: Program) -> float:
    """FLOPs of all matmuls and convolutions, a multiply-add counted as two; recomputation included."""
    return sum(times * flops(each, within) for each, within, _, times, _ in program.walk())


def flops(each: Instruction, within: dict[str, Instruction]) -> float:
    """FLOPs of one run of an instruction; 0 for whatever is no matmul."""
    if each.opcode == "dot" or "$gemm" in each.attributes or "$lt$matmul" in each.attributes:
        left = within[each.operands[0]].shapes[0][1]
        sides = _found(r'"?lhs_contracting_dim(?:ension)?s"?[=:][{\[]([\d",]*)[}\]]', each.attributes)
        contracted = math.prod(left[int(at)] for at in re.findall(r"\d+", sides[1]))
        return 2.0 * math.prod(each.shapes[0][1]) * contracted
    if each.opcode == "convolution":
        return _convolution(each, within[each.operands[0]].shapes[0][1], within[each.operands[1]].shapes[0][1])
    return 0.0


def traffic(program: Program) -> float:
    """Bytes that are read from and written to memory: each kernel's operands and results, slices as their own size."""
    total = 0.0
    inside = {name for computation in program.computations.values() for each in computation.values()
              if each.opcode == "fusion" for name in program.called(each)}  # fmt: skip
    for each, within, name, times, _ in program.walk():
        if name in inside or each.opcode in FREE or each.opcode.endswith(("-done", "-update")):
            continue
        body = program.computations[program.called(each)[0]] if each.opcode == "fusion" else {}
        total += times * (_read(each, within, body) + _written(each, within, body))
    return total


# ---------------------------------------------------------------- reading the text


def _instruction(line: str) -> Instruction | None:
    head, _, rest = line.strip().partition(" = ")
    shape, rest = _split_shape(rest)
    match = re.match(r"\s*([\w\-]+)\(", rest)
    if not match:
        return None
    end = _closing(rest, match.end() - 1)
    arguments = rest[match.end() : end]
    return Instruction(
        name=head.split("%")[-1].split()[-1],
        opcode=match[1],
        shapes=tuple((kind, tuple(map(int, filter(None, dims.split(","))))) for kind, dims in _SHAPE.findall(shape)),
        operands=tuple(_NAME.findall(arguments)),
        arguments=arguments,
        attributes=rest[end + 1 :],
        root=head.startswith("ROOT"),
    )


def _found(pattern: str, text: str) -> re.Match[str]:
    """The first match. Raises ValueError where the compiler wrote none."""
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"{text:.200}: expected {pattern}")
    return match


def _total(parts: Sequence[int | None]) -> int | None:
    """The sum; None where one of them is not known."""
    known = [part for part in parts if part is not None]
    return sum(known) if len(known) == len(parts) else None


def _index(each: Instruction) -> int:
    """Which part of a tuple a get-tuple-element takes."""
    return int(_found(r"index=(\d+)", each.attributes)[1])


def _split_shape(rest: str) -> tuple[str, str]:
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.find(" ")
    return rest[:end], rest[end:]


def _closing(text: str, at: int) -> int:
    """Where the parenthesis that opens at `at` closes."""
    depth = 0
    for place in range(at, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if not depth:
            return place
    return len(text)


def _bytes(shapes: tuple[Shape, ...]) -> float:
    return sum(math.prod(dims) * _bits(kind) / 8 for kind, dims in shapes)


def _bits(kind: str) -> int:
    if kind in BITS:
        return BITS[kind]
    digits = re.match(r"[a-z]+(\d+)", kind)  # bf16, f8e4m3fn, s32
    return int(digits[1]) if digits else 0


def _group(attributes: str) -> tuple[int, ...]:
    """Partition ids of a collective's first group; written as a list, as an iota, or as axes of a mesh."""
    if pairs := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", attributes):
        return int(pairs[1]), int(pairs[2])
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes):
        sizes = {axis: int(size) for axis, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        ids = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
        named = re.findall(r"'(\w+)'", mesh[2])
        return tuple(ids[tuple(slice(None) if axis in named else 0 for axis in sizes)].flatten().tolist())
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        ids = np.arange(int(iota[1]) * int(iota[2])).reshape(tuple(map(int, iota[3].split(","))))
        ids = ids.transpose(tuple(map(int, iota[4].split(",")))) if iota[4] else ids
        return tuple(ids.reshape(int(iota[1]), int(iota[2]))[0].tolist())
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return tuple(map(int, listed[1].split(",")))
    return ()


# ---------------------------------------------------------------- FLOPs and bytes of one instruction


def _convolution(each: Instruction, left: tuple[int, ...], right: tuple[int, ...]) -> float:
    """Only multiplications with elements that are there: the TPU's compiler writes batched matmuls as convolutions."""
    labels = _found(r"dim_labels=(\w+)_(\w+)->(\w+)", each.attributes)
    lhs, rhs, out = labels[1], labels[2], labels[3]
    result = each.shapes[0][1]
    window = dict(re.findall(r"(\w+)=([\dx_\-]+)", (re.search(r"window=\{([^}]*)\}", each.attributes) or ["", ""])[1]))
    pairs = 1
    for label in filter(str.isdigit, out):
        at = int(label)
        get = lambda key, default: window[key].split("x")[at] if key in window else default  # noqa: B023, E731
        outputs, inputs, taps = result[out.index(label)], left[lhs.index(label)], right[rhs.index(label)]
        before = int(get("pad", "0_0").split("_")[0])
        place = np.arange(outputs)[:, None] * int(get("stride", "1")) - before
        place = place + np.arange(taps)[None] * int(get("rhs_dilate", "1"))
        dilation = int(get("lhs_dilate", "1"))
        inside = (place >= 0) & (place <= (inputs - 1) * dilation) & (place % dilation == 0)
        pairs *= int(inside.sum())
    groups = int((re.search(r"batch_group_count=(\d+)", each.attributes) or ["", "1"])[1])
    batch, features = result[out.index("b")], result[out.index("f")]
    return 2.0 * batch * features * pairs * right[rhs.index("i")] / groups


def _read(each: Instruction, within: dict[str, Instruction], body: dict[str, Instruction]) -> float:
    if each.opcode in ("dynamic-slice", "gather", "slice"):
        return _bytes(each.shapes)
    if each.opcode == "dynamic-update-slice":
        return _bytes(within[each.operands[1]].shapes)
    parameters = {int(i.arguments): i.name for i in body.values() if i.opcode == "parameter"}
    total = 0.0
    for place, operand in enumerate(each.operands):
        if operand not in within:
            continue
        users = [i for i in body.values() if parameters.get(place) in i.operands]
        sliced = [i for i in users if i.opcode in ("dynamic-slice", "gather", "slice")]
        updated = [i for i in users if i.opcode == "dynamic-update-slice" and i.operands[0] == parameters[place]]
        if users and len(sliced) + len(updated) == len(users):
            total += sum(_bytes(i.shapes) for i in sliced)
        else:
            total += _bytes(within[operand].shapes)
    return total


def _written(each: Instruction, within: dict[str, Instruction], body: dict[str, Instruction]) -> float:
    if each.opcode == "dynamic-update-slice":
        return _bytes(within[each.operands[1]].shapes)
    updates = [i for i in body.values() if i.opcode == "dynamic-update-slice"]
    whole = _bytes(each.shapes)
    return whole - sum(_bytes(i.shapes) - _bytes(body[i.operands[1]].shapes) for i in updates) if updates else whole
