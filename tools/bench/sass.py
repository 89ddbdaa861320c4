"""Reads the machine code of a compiled kernel (`nvdisasm -c`): how much of it there is, and whether it is safe to run.

A Hopper matrix product (HGMMA) is asynchronous: the warp goes on while the tensor core reads. Where its first operand lies in
registers, nothing may write them before the product is waited for; versions of ptxas are known that let that happen, and the
result is wrong numbers without an error. No interpreter can see it, so every compiled kernel is checked instruction by
instruction along every path from such a product to its wait.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

_LABEL = re.compile(r"\s*(\.L_x_\d+):")
_LINE = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+((?:@!?U?P\w+)\s+)?([A-Z][A-Za-z0-9_.]*)\s*([^;]*);")
_REGISTER = re.compile(r"\bR(\d+)\b")
_PRODUCT = re.compile(r"R\d+, R(\d+), ")
_WAIT = re.compile(r"gsb\d+, 0x([0-9a-f]+)")
# Their first operand is an address or a barrier, not a register that they write.
_WRITES_NOTHING = (
    "ST",
    "RED",
    "BAR",
    "WARPGROUP",
    "BRA",
    "EXIT",
    "NOP",
    "LDGSTS",
    "LDGDEPBAR",
    "DEPBAR",
    "R2UR",
    "UMOV",
    "CCTL",
)
# Registers of a first operand in registers: a warp holds 16 rows of 32 bytes.
_OPERAND = 4


@dataclass(frozen=True)
class Instruction:
    """One line: predicate or empty, opcode with its modifiers, operands as text."""

    predicate: str
    opcode: str
    operands: str

    def written(self) -> set[int]:
        """Numbers of the registers that it writes."""
        if self.opcode.startswith(_WRITES_NOTHING):
            return set()
        first = self.operands.split(",")[0]
        match = _REGISTER.search(first)
        if match is None or "[" in first:
            return set()
        start = int(match[1])
        return set(range(start, start + self._width()))

    def _width(self) -> int:
        parts = self.opcode.split(".")
        if parts[0] == "HGMMA":
            shape = next(p for p in parts if p.count("x") == 2)
            return int(shape.split("x")[1]) // (2 if "F32" in parts else 4)
        if parts[0] == "HMMA":
            return 4
        if "128" in parts or (parts[0] == "LDSM" and "4" in parts):
            return 4
        return 2 if {"64", "WIDE"} & set(parts) or (parts[0] == "LDSM" and "2" in parts) else 1

    def operand(self) -> set[int] | None:
        """Registers that an asynchronous product reads as its first operand; None for anything else."""
        match = _PRODUCT.match(self.operands) if self.opcode.startswith("HGMMA") else None
        return None if match is None else set(range(int(match[1]), int(match[1]) + _OPERAND))


class Listing:
    """The instructions of one kernel, in order, with the targets of its branches."""

    def __init__(self, text: str) -> None:
        self.instructions: list[Instruction] = []
        self.labels: dict[str, int] = {}
        for line in text.splitlines():
            if label := _LABEL.match(line):
                self.labels[label[1]] = len(self.instructions)
            elif match := _LINE.match(line):
                self.instructions.append(Instruction((match[1] or "").strip(), match[2], match[3].strip()))

    def count(self, *opcodes: str) -> int:
        """Instructions whose opcode, without modifiers, is one of these."""
        return sum(i.opcode.split(".")[0] in opcodes for i in self.instructions)

    def longest_loop(self) -> int:
        """Instructions between a backward branch and its target, the most there are; 0 without a loop."""
        spans = [i - self.labels[t] + 1 for i, t in self._branches() if self.labels[t] < i]
        return max(spans, default=0)

    def _branches(self) -> Iterator[tuple[int, str]]:
        for index, instruction in enumerate(self.instructions):
            target = re.search(r"\.L_x_\d+", instruction.operands) if instruction.opcode.startswith("BRA") else None
            if target and target[0] in self.labels:
                yield index, target[0]

    def products_from_registers(self) -> int:
        """Asynchronous products whose first operand lies in registers."""
        return sum(i.operand() is not None for i in self.instructions)

    def overwritten(self) -> list[str]:
        """Instructions that write a register which an asynchronous product, not yet waited for, still reads; as text."""
        branches = dict(self._branches())
        found = []
        for index, product in enumerate(self.instructions):
            registers = product.operand()
            if registers is not None:
                found += list(self._writers(index, registers, branches))
        return found

    def _writers(self, start: int, registers: set[int], branches: dict[int, str]) -> Iterator[str]:
        """Follows every path from the product at `start` to its wait.

        Products are committed in groups (`gsb0`), in order; a wait names how many groups may still be under way.
        """
        own = "gsb0" in self.instructions[start].operands
        ahead, visited = [(start + 1, 0 if own else -1)], set()
        while ahead:
            at, later = ahead.pop()
            if at >= len(self.instructions) or (at, later) in visited:
                continue
            visited.add((at, later))
            instruction = self.instructions[at]
            if instruction.opcode.startswith("WARPGROUP.DEPBAR"):
                wait = _WAIT.search(instruction.operands)
                if wait is not None and later >= int(wait[1], 16):
                    continue
            if instruction.written() & registers:
                yield f"{instruction.opcode} {instruction.operands}"
            later += instruction.opcode.startswith("HGMMA") and "gsb0" in instruction.operands
            if at in branches:
                ahead.append((self.labels[branches[at]], later))
            always = not instruction.predicate and instruction.opcode.startswith(("BRA", "EXIT", "RET"))
            if not always:
                ahead.append((at + 1, later))
