"""What a compiled kernel costs, from the compilers' output: registers, spills, access width, counts.

Knows SASS, PTX and the two tools that print them (``cuobjdump`` ships in Triton's wheel); nothing of
modeprobe. A cubin or an object file with several architectures goes in, one :class:`Resources` per kernel
and architecture comes out.
"""

from __future__ import annotations

import heapq
import os
import re
import shutil
import subprocess
from collections import defaultdict
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path


@dataclass(frozen=True)
class Instruction:
    """One line of SASS, for example ``@!P0 LDG.E.128 R4, desc[UR4][R2.64]`` at ``address`` (bytes)."""

    address: int
    predicate: str
    opcode: str
    operands: str

    @property
    def name(self) -> str:
        return self.opcode.split(".")[0]


@dataclass(frozen=True)
class Resources:
    """The numbers of one kernel on one architecture.

    ``spills``: accesses to local memory in the SASS. ``f64``: float64 instructions. ``vector_loads`` and
    ``vector_stores``: 16-byte accesses to global memory; ``loads`` and ``stores``: all of them.
    ``per_element``: instructions per element on the usual path of the innermost 16-byte loop, None where
    the kernel has no such loop or the element size is not known. ``in_flight``: bytes of 16-byte loads that
    a thread can wait for at a time, None where it has none or, like a kernel that fetches all its data at
    once, no limit.
    """

    kernel: str
    arch: str
    registers: int
    spills: int
    stack: int
    shared: int
    vector_loads: int
    vector_stores: int
    loads: int
    stores: int
    f64: int
    per_element: float | None = None
    in_flight: int | None = None

    def warps_per_sm(self, threads: int, registers_per_sm: int = 65536, most: int = 64) -> int:
        """Warps of ``threads``-thread blocks that registers and static shared memory let reside on one SM."""
        warps = -(-threads // 32)
        per_warp = -(-self.registers * 32 // 256) * 256
        fitting = shared_per_sm(self.arch) // (self.shared + 1024)
        return min(most // warps, registers_per_sm // per_warp // warps, fitting) * warps

    def in_flight_per_sm(self, threads: int, blocks: int) -> int | None:
        """Bytes that the threads of one SM wait for together, of ``blocks`` blocks at most."""
        if self.in_flight is None:
            return None
        return self.in_flight * min(self.warps_per_sm(threads) * 32, blocks * threads)


def shared_per_sm(arch: str) -> int:
    """Bytes of shared memory of one SM; a block takes 1 KiB more than it asks for."""
    return (164 if arch == "sm_80" else 228) << 10


def tool(name: str) -> Path | None:
    """``cuobjdump`` or ``nvdisasm``: from PATH, CUDA_HOME, or Triton's wheel; None if nowhere."""
    found = shutil.which(name)
    if found:
        return Path(found)
    places = [Path(os.environ[key]) / "bin" for key in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(key)]
    triton = find_spec("triton")
    if triton and triton.origin:
        places.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    return next((place / name for place in places if (place / name).exists()), None)


def why_no_tool(name: str = "cuobjdump") -> str | None:
    """Why SASS cannot be read here; None if it can."""
    if tool(name):
        return None
    return (
        f"{name} was not found: install triton (its wheel carries it) or put the CUDA toolkit's bin on PATH"
    )


def _run(*command: str | Path) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise RuntimeError(f"{Path(command[0]).name} failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def demangle(names: list[str]) -> dict[str, str]:
    """Readable names where ``c++filt`` is there, the same names where it is not."""
    filter_tool = shutil.which("c++filt")
    if not names or filter_tool is None:
        return {name: name for name in names}
    done = subprocess.run([filter_tool], input="\n".join(names), capture_output=True, text=True, timeout=60)
    return dict(zip(names, done.stdout.splitlines(), strict=True))


_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")


def parse_sass(text: str) -> dict[tuple[str, str], list[Instruction]]:
    """``cuobjdump -sass`` output -> {(kernel, arch): instructions}; the trailing padding is dropped."""
    found: dict[tuple[str, str], list[Instruction]] = {}
    arch, body = "", None
    for line in text.splitlines():
        if match := re.search(r"(?:code for|arch =)\s+(sm_\w+)", line):
            arch = match[1]
        elif match := re.search(r"Function : (\S+)", line):
            body = found.setdefault((match[1], arch), [])
        elif body is not None and (match := _INSTRUCTION.match(line)) and match[3] != "NOP":
            body.append(Instruction(int(match[1], 16), (match[2] or "").strip(), match[3], match[4].strip()))
    return {key: value for key, value in found.items() if value}


def parse_usage(text: str) -> dict[tuple[str, str], dict[str, int]]:
    """``cuobjdump -res-usage`` output -> {(kernel, arch): {"REG": 32, "STACK": 0, ...}}."""
    found: dict[tuple[str, str], dict[str, int]] = {}
    arch, name = "", ""
    for line in text.splitlines():
        if match := re.search(r"arch = (sm_\w+)", line):
            arch = match[1]
        elif match := re.search(r"^\s*Function (\S+):\s*$", line):
            name = match[1]
        elif name and " REG:" in f" {line.strip()}":
            found[name, arch] = {key: int(number) for key, number in re.findall(r"(\w+):(\d+)", line)}
            name = ""
    return found


def count_f64(instructions: list[Instruction]) -> int:
    """Float64 arithmetic, comparisons and conversions in SASS."""
    doubles = ("DADD", "DMUL", "DFMA", "DSETP", "DMNMX", "DMMA")
    return sum(
        one.name in doubles or ".F64" in one.opcode or one.opcode.startswith("MUFU.RCP64")
        for one in instructions
    )


def count_ptx_f64(ptx: str) -> int:
    """Float64 instructions in PTX; moves, loads and stores count too: a narrower kernel has none."""
    return sum(
        ".f64" in line.split("//")[0]
        and not line.strip().startswith((".reg", ".param", ".visible", ".entry"))
        for line in ptx.splitlines()
    )


def _is_global(one: Instruction, kind: str) -> bool:
    """A copy from global to shared memory is a load, too."""
    return one.name == kind or (kind == "LDG" and (one.name == "LDGSTS" or one.opcode.startswith("LD.E")))


def _jumps(one: Instruction) -> bool:
    """Not for a warp whose threads are together: BRA.DIV leaves it before a shuffle if they are not."""
    return one.name == "BRA" and ".DIV" not in one.opcode


def _target(one: Instruction) -> int | None:
    if not _jumps(one):
        return None
    match = re.search(r"(0x[0-9a-f]+)\s*$", one.operands)
    return int(match[1], 16) if match else None


def _blocks(instructions: list[Instruction]) -> tuple[list[list[Instruction]], dict[int, list[int]]]:
    """Basic blocks and their successors."""
    starts = {instructions[0].address}
    for one, after in zip(instructions, [*instructions[1:], None], strict=True):
        target = _target(one)
        if target is not None:
            starts.add(target)
        if after is not None and (_jumps(one) or one.name in ("EXIT", "RET", "BSYNC", "BREAK")):
            starts.add(after.address)
    blocks: list[list[Instruction]] = []
    for one in instructions:
        if one.address in starts:
            blocks.append([])
        blocks[-1].append(one)
    index = {block[0].address: number for number, block in enumerate(blocks)}
    successors: dict[int, list[int]] = defaultdict(list)
    for number, block in enumerate(blocks):
        last = block[-1]
        target = _target(last)
        if target is not None and target in index:
            successors[number].append(index[target])
        leaves = _jumps(last) or last.name in ("EXIT", "RET")
        always = leaves and not last.predicate and "P" not in last.operands
        if number + 1 < len(blocks) and not always:
            successors[number].append(number + 1)
    return blocks, successors


def _cheapest(
    costs: list[int], successors: dict[int, list[int]], allowed: range, start: int, goal: int
) -> tuple[int, list[int]] | None:
    queue = [(costs[start], start, [start])]
    seen: set[int] = set()
    while queue:
        cost, at, path = heapq.heappop(queue)
        if at == goal:
            return cost, path
        if at in seen:
            continue
        seen.add(at)
        for after in successors[at]:
            if after in allowed and after not in seen:
                heapq.heappush(queue, (cost + costs[after], after, [*path, after]))
    return None


def hot_path(instructions: list[Instruction]) -> list[Instruction] | None:
    """The usual pass through the smallest loop that loads 16 bytes: side exits (a tie, an edge) left out.

    The cheapest way from the loop's head through its last 16-byte store (or load, in a loop that stores
    nothing) to the jump back. None without such a loop.
    """
    blocks, successors = _blocks(instructions)
    costs = [len(block) for block in blocks]
    best: tuple[int, list[int]] | None = None
    for latch, after in list(successors.items()):
        for head in (number for number in after if number <= latch):
            inside = range(head, latch + 1)
            touched = [
                number
                for number in inside
                for kind in ("STG", "LDG")
                if any(_is_global(one, kind) and ".128" in one.opcode for one in blocks[number])
            ]
            loading = any(
                _is_global(one, "LDG") and ".128" in one.opcode for number in inside for one in blocks[number]
            )
            if not loading:
                continue
            stores = [n for n in touched if any(_is_global(one, "STG") for one in blocks[n])]
            through = max(stores or touched)
            first = _cheapest(costs, successors, inside, head, through)
            second = _cheapest(costs, successors, inside, through, latch)
            if first and second:
                path = (first[0] + second[0] - costs[through], first[1] + second[1][1:])
                if best is None or path[0] < best[0]:
                    best = path
    if best is None:
        return None
    return [one for number in best[1] for one in blocks[number]]


def bytes_in_flight(instructions: list[Instruction]) -> int | None:
    """Bytes of 16-byte loads that one thread has on their way at a time.

    Copies to shared memory: those of the groups that a wait leaves pending, and of the next one. Loads into
    registers: as many as the loop issues before it touches a register that one of them fills.
    """
    groups, pending = [0], -1
    for one in instructions:
        groups[-1] += 16 * (one.name == "LDGSTS" and ".128" in one.opcode)
        if one.name == "LDGDEPBAR":
            groups.append(0)
        elif one.name == "DEPBAR" and (match := re.search(r"SB0, 0x([0-9a-f]+)", one.operands)):
            pending = max(pending, int(match[1], 16))
    if any(groups):
        everything = pending <= 0 and not _groups_in_a_loop(instructions)
        return None if everything else (max(pending, 0) + 1) * max(groups)
    path = _through_loads(instructions)
    waiting: dict[int, set[str]] = {}
    most = 0
    for number, one in enumerate([*path, *path]):
        filled = set()
        named = one.operands
        if _is_global(one, "LDG") and ".128" in one.opcode:
            first, _, named = one.operands.partition(",")
            start = int(first.strip().lstrip("R"))
            filled = {f"R{start + k}" for k in range(4)}
        touched = filled | set(re.findall(r"\bR\d+\b", named))
        if any(touched & others for others in waiting.values()):
            waiting.clear()
        if filled:
            waiting[number] = filled
            most = max(most, 16 * len(waiting))
    return most or None


def _groups_in_a_loop(instructions: list[Instruction]) -> bool:
    """Whether a loop that copies to shared memory also ends groups there."""
    blocks, successors = _blocks(instructions)
    for latch, after in successors.items():
        for head in (number for number in after if number <= latch):
            names = {one.name for block in blocks[head : latch + 1] for one in block}
            if {"LDGSTS", "LDGDEPBAR"} <= names:
                return True
    return False


def _through_loads(instructions: list[Instruction], sums: int = 0) -> list[Instruction]:
    """The way through the loop with the most 16-byte loads, or else through the kernel, past each of them.

    sums: also past each block that adds up so many values in one go, which a shorter way would leave out.
    """
    blocks, successors = _blocks(instructions)
    costs = [len(block) for block in blocks]
    loading = [
        number
        for number, block in enumerate(blocks)
        if any(_is_global(one, "LDG") and ".128" in one.opcode for one in block)
    ]
    adding = [
        number
        for number, block in enumerate(blocks)
        if sums and sum(one.name == "FFMA" and not one.predicate for one in block) >= sums
    ]
    loops = [(head, latch) for latch, after in successors.items() for head in after if head <= latch]
    # The smallest of those with the most loads: an outer loop has no more than its inner one.
    head, latch = min(
        loops,
        key=lambda loop: (-sum(loop[0] <= n <= loop[1] for n in loading), loop[1] - loop[0]),
        default=(0, len(blocks) - 1),
    )
    if not any(head <= number <= latch for number in loading):
        head, latch = 0, len(blocks) - 1
    inside = range(head, latch + 1)
    path = [head]
    for goal in [*(number for number in sorted({*loading, *adding}) if number in inside), latch]:
        step = _cheapest(costs, successors, inside, path[-1], goal)
        if step:
            path += step[1][1:]
    return [one for number in path for one in blocks[number]]


def straight_path(instructions: list[Instruction]) -> list[Instruction] | None:
    """The usual pass through a kernel without such a loop: from its entry, through its first barrier (where a
    block agrees on what it found) and its 16-byte stores, to an exit. None if it stores no 16 bytes."""
    blocks, successors = _blocks(instructions)
    costs = [len(block) for block in blocks]
    everywhere = range(len(blocks))
    storing = [n for n in everywhere if any(o.name == "STG" and ".128" in o.opcode for o in blocks[n])]
    barriers = [n for n in everywhere if any(one.name == "BAR" for one in blocks[n])]
    exits = [n for n in everywhere if any(one.name == "EXIT" for one in blocks[n])]
    if not storing or not exits:
        return None
    path = [0]
    for goal in [*barriers[:1], *storing]:
        step = _cheapest(costs, successors, everywhere, path[-1], goal)
        if step:
            path += step[1][1:]
    ends = [found for end in exits if (found := _cheapest(costs, successors, everywhere, path[-1], end))]
    if ends:
        path += min(ends)[1][1:]
    return [one for number in path for one in blocks[number]]


def instructions_per_element(instructions: list[Instruction], itemsize: int) -> float | None:
    """SASS instructions per element of ``itemsize`` bytes in the kernel's hot loop or, in a kernel without a
    loop, from entry to exit, where these store 16 bytes at a time. In a kernel that never does, a reduction,
    of 32 bits and fewer, per element loaded; None where it does not load 16 bytes at a time either."""

    def count(path: list[Instruction], kind: str) -> int:
        return sum(_is_global(one, kind) and ".128" in one.opcode for one in path)

    if not count(instructions, "STG"):
        if itemsize > 4:
            return None
        path = _through_loads(instructions, sums=16 // itemsize)
        loaded = count(path, "LDG")
        # Functions such as exp are chosen at run time: no way through them is the usual one.
        usual = loaded and not any(one.name == "MUFU" for one in path)
        return len(path) * itemsize / (16 * loaded) if usual else None
    found = hot_path(instructions) or straight_path(instructions)
    stored = count(found, "STG") if found else 0
    return len(found) * itemsize / (16 * stored) if found and stored else None


def read(binary: Path | str, itemsizes: dict[str, int] | None = None) -> list[Resources]:
    """Every kernel in a cubin, object file or shared library.

    Args:
        binary: path of the file.
        itemsizes: {part of a kernel's readable name: bytes per element}, for ``per_element``.

    Raises:
        RuntimeError: no ``cuobjdump``, or it failed.
    """
    reason = why_no_tool()
    if reason:
        raise RuntimeError(reason)
    dump = tool("cuobjdump")
    assert dump is not None
    sass = parse_sass(_run(dump, "-sass", binary))
    usage = parse_usage(_run(dump, "-res-usage", binary))
    names = demangle(sorted({name for name, _ in sass}))
    found = []
    for (name, arch), body in sass.items():
        used = usage.get((name, arch)) or usage.get((name, ""), {})  # a lone cubin prints no arch there
        readable = names[name]
        itemsize = next((size for part, size in (itemsizes or {}).items() if part in readable), None)
        found.append(
            Resources(
                kernel=readable,
                arch=arch,
                registers=used.get("REG", 0),
                spills=sum(one.name in ("LDL", "STL") for one in body),
                stack=used.get("STACK", 0),
                shared=used.get("SHARED", 0),
                vector_loads=sum(_is_global(one, "LDG") and ".128" in one.opcode for one in body),
                vector_stores=sum(one.name == "STG" and ".128" in one.opcode for one in body),
                loads=sum(_is_global(one, "LDG") for one in body),
                stores=sum(one.name == "STG" for one in body),
                f64=count_f64(body),
                per_element=instructions_per_element(body, itemsize) if itemsize else None,
                in_flight=bytes_in_flight(body),
            )
        )
    return sorted(found, key=lambda one: (one.kernel, int(one.arch[3:].rstrip("af"))))


HEADER = (
    "kernel",
    "arch",
    "registers",
    "spills",
    "stack",
    "shared",
    "16-byte loads",
    "16-byte stores",
    "f64",
    "instructions / element",
)
IN_FLIGHT = "KiB in flight / SM"


def rows(resources: list[Resources]) -> list[tuple[str, ...]]:
    """One row of strings per kernel, under :data:`HEADER`."""
    return [
        (
            one.kernel,
            one.arch,
            str(one.registers),
            str(one.spills),
            str(one.stack),
            str(one.shared),
            f"{one.vector_loads} of {one.loads}",
            f"{one.vector_stores} of {one.stores}",
            str(one.f64),
            "" if one.per_element is None else f"{one.per_element:.1f}",
        )
        for one in resources
    ]


def markdown(resources: list[Resources], threads: int = 0, blocks: int = 0) -> str:
    """The table as Markdown; with ``threads`` per block, ``blocks`` per SM at most, and what is in flight."""
    header: tuple[str, ...] = HEADER
    body = rows(resources)
    if threads:
        header = (*HEADER, IN_FLIGHT)
        waiting = [one.in_flight_per_sm(threads, blocks) for one in resources]
        body = [
            (*row, "" if count is None else f"{count / 1024:.0f}")
            for row, count in zip(body, waiting, strict=True)
        ]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in body]
    return "\n".join(lines) + "\n"
