"""The check of machine code: no register that an asynchronous product still reads is written, on any path to the wait."""

from __future__ import annotations

import pytest

from tools.bench.sass import Listing

PRODUCT = "HGMMA.64x32x16.F32.BF16 R24, R40, gdesc[UR20].tnspB, R24, gsb0"
WAIT = "WARPGROUP.DEPBAR.LE gsb0, 0x0"


def listing(*lines: str) -> Listing:
    """Lines of code, and labels (`.L_x_1:`), as nvdisasm prints them."""
    texts = [line if line.startswith(".L") else f"        /*{16 * i:04x}*/          {line} ;" for i, line in enumerate(lines)]
    return Listing("\n".join(texts))


@pytest.mark.parametrize(
    ("write", "early"),
    [
        ("MOV R41, R2", True),
        ("MOV R44, R2", False),  # the register behind the operand's four
        ("LDS.128 R38, [R7]", True),  # R38 to R41
        ("IMAD.WIDE R38, R2, R3, R4", False),  # R38 and R39
        ("@P0 FADD R43, R1, R2", True),
        ("STS.128 [R40], R4", False),  # reads it as an address
        ("ISETP.GE.AND P0, PT, R40, R2, PT", False),
        ("HGMMA.64x32x16.F32.BF16 R32, R60, gdesc[UR4], R32, gsb0", True),  # its accumulator is R32 to R47
    ],
)
def test_what_writes_an_operand_before_the_wait(write: str, early: bool) -> None:
    assert bool(listing(PRODUCT, write, WAIT, "EXIT").overwritten()) is early
    assert listing(PRODUCT, WAIT, write, "EXIT").overwritten() == []
    assert listing(write, PRODUCT, WAIT, "EXIT").overwritten() == []


def test_products_whose_operands_lie_in_shared_memory_have_no_register_to_protect() -> None:
    code = listing("HGMMA.64x32x16.F32.BF16 R24, gdesc[UR8], R24, gsb0", "MOV R40, R2", WAIT, "EXIT")
    assert code.products_from_registers() == 0 and not code.overwritten()


def test_the_wait_is_looked_for_along_branches() -> None:
    """In a loop the wait may stand at its head: what is written between the branch's target and there counts too."""
    loop = [".L_x_1:", "MOV R40, R2", WAIT, "MOV R41, R3", PRODUCT, "@P0 BRA `(.L_x_1)", WAIT, "EXIT"]
    assert listing(*loop).overwritten() == ["MOV R40, R2"]
    assert listing(*loop).longest_loop() == 5
    jump = [PRODUCT, "BRA `(.L_x_2)", "MOV R40, R2", ".L_x_2:", WAIT, "EXIT"]
    assert listing(*jump).overwritten() == []  # never executed


def test_a_wait_that_leaves_groups_under_way() -> None:
    """`0x1` waits for all groups but the newest: the product of an older group is done, that of the newest is not."""
    other = "HGMMA.64x32x16.F32.BF16 R80, R60, gdesc[UR4], R80, gsb0"
    leave_one = "WARPGROUP.DEPBAR.LE gsb0, 0x1"
    assert listing(PRODUCT, other, leave_one, "MOV R40, R2", WAIT, "EXIT").overwritten() == []
    assert listing(other, PRODUCT, leave_one, "MOV R40, R2", WAIT, "EXIT").overwritten() == ["MOV R40, R2"]
    uncommitted = PRODUCT.replace(", gsb0", "")  # it belongs to the group that the next one closes
    assert listing(uncommitted, other, leave_one, "MOV R40, R2", WAIT, "EXIT").overwritten() == ["MOV R40, R2"]
