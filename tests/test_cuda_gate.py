"""The gate over compiled CUDA kernels finds what it is there to find."""

from __future__ import annotations

import pytest
from cuda_gate import RULES, SLOW_WARNINGS, Instruction, Kernel, Rule, read_report, read_sass, touched, violations

REPORT = """
ptxas info    : Compiling entry function '_Z20skinny_matmul_kernel' for 'sm_90a'
ptxas info    : Function properties for _Z20skinny_matmul_kernel
    16 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 128 registers, used 1 barriers
"""
SASS = """
\t\tFunction : _Z20skinny_matmul_kernel
        /*0000*/                   LDC R1, c[0x0][0x28] ;       /* 0x00000a00ff017b82 */
        /*0010*/              @!P0 LDGSTS.E.BYPASS.128 [R5], desc[UR4][R2.64] ;
        /*0020*/                   HMMA.16816.F32.BF16 R4, R8, R2, R4 ;
        /*0030*/             @!UP0 STL [R1], R2 ;
"""


PRODUCTS = """
\t\tFunction : _Z20wgmma_matmul_kernel
        /*0000*/                   HGMMA.64x16x16.F32.BF16 R24, gdesc[UR20], RZ, !UPT ;
        /*0010*/                   HGMMA.64x16x16.F32.BF16 R24, gdesc[UR20], R24, gsb0 ;
        /*0020*/                   HGMMA.64x16x16.F32.BF16 R40, R8, gdesc[UR16].tnspB, R40, gsb0 ;
        /*0030*/                   {} ;
        /*0040*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*0050*/                   {} ;
        /*0060*/              @!P0 BRA 0x30 ;
        /*0070*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0080*/                   FADD R24, R40, R11 ;
        /*0090*/                   EXIT ;
"""


def kernel_of(rule: Rule, registers: int) -> Kernel:
    """A kernel of the instructions that a rule requires, the wait for earlier kernels first."""
    words = sorted((*rule.required, *rule.hopper), key=lambda word: word != "ACQBULK")
    product = {"HGMMA": (".64x8x16", "R8, gdesc[UR4], R8, gsb0")}
    code = [
        Instruction(place * 16, word.partition(".")[0], *product.get(word, (f".{word}", "")))
        for place, word in enumerate(words)
    ]
    return Kernel(rule.name, registers, code=code)


def test_reads_registers_spills_and_instructions():
    (kernel,) = read_report(REPORT).values()
    assert (kernel.registers, kernel.spilled, kernel.stack) == (128, 12, 16)
    kernel.code = read_sass(SASS)[kernel.name]
    assert kernel.instructions == {"LDC", "LDGSTS", "LDGSTS.128", "HMMA", "STL"}


def test_every_broken_rule_is_told():
    (kernel,) = read_report(REPORT).values()
    kernel.code = read_sass(SASS)[kernel.name]
    told = "; ".join(violations(kernel, "sm_90a"))
    for what in ("spills 12 bytes, stack of 16", "128 registers, at most 112", "no LDSM", "no ACQBULK", "has STL"):
        assert what in told
    assert "ACQBULK" not in "; ".join(violations(kernel, "sm_80"))
    assert "no rule" in violations(Kernel("_Z7unknown"), "sm_80")[0]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_a_kernel_within_its_rule_passes(rule):
    assert violations(kernel_of(rule, rule.registers), "sm_90a") == []


def test_registers_that_warpgroups_share_out_have_one_number():
    rule = next(rule for rule in RULES if rule.exact)
    fewer = kernel_of(rule, rule.registers - 8)
    assert violations(fewer, "sm_90a") == ["160 registers, exactly 168 have to be"] and not violations(fewer, "sm_80")


@pytest.mark.parametrize(
    ("first", "second", "found"),
    [
        ("IADD3 R32, R33, R34", "FADD R4, R24, R25", []),
        ("FADD R4, R24, R25", "NOP", [0x30]),  # a sum that is under way
        ("NOP", "MOV R31, R4", []),
        ("NOP", "MOV R40, R4", [0x50]),
        ("LDS.128 R20, [R2]", "SHFL.BFLY PT, R11, R4, 0x1", [0x50]),  # an operand
        ("LDS.128 R21, [R2]", "NOP", [0x30]),  # its last register is a sum
        ("STS [R12], R8", "ISETP.GE.AND P0, PT, R8, R9, PT", []),  # an operand may be read
        ("MOV R47, R4", "NOP", [0x30]),
    ],
)
def test_registers_of_products_under_way_are_left_alone(first, second, found):
    code = read_sass(PRODUCTS.format(first, second))["_Z20wgmma_matmul_kernel"]
    assert [i.address for i in touched(code)] == found


def test_products_are_followed_on_both_ways_of_a_branch():
    code = read_sass("""
        Function : wgmma
        /*0000*/                   HGMMA.64x16x16.F32.BF16 R24, gdesc[UR20], RZ, !UPT, gsb0 ;
        /*0010*/               @P0 BRA 0x40 ;
        /*0020*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0030*/                   BRA 0x50 ;
        /*0040*/                   MOV R24, R4 ;
        /*0050*/                   MOV R25, R4 ;
        /*0060*/                   EXIT ;
    """)["wgmma"]
    assert [i.address for i in touched(code)] == [0x40, 0x50]


def test_long_code_is_told():
    rule = RULES[0]
    kernel = kernel_of(rule, rule.registers)
    kernel.code += [Instruction(0x1000, "NOP", "", "")] * 6200
    assert violations(kernel, "sm_80") == ["97 KB of code, at most 96 may be"]


def test_products_are_not_fenced():
    rule = next(rule for rule in RULES if "HGMMA" in rule.hopper)
    kernel = kernel_of(rule, rule.registers)
    place = next(place for place, i in enumerate(kernel.code) if i.name == "HGMMA")
    kernel.code[place + 1 : place + 1] = [Instruction(-16, "MEMBAR", ".ALL.GPU", ""), kernel.code[place]]
    assert violations(kernel, "sm_90a") == ["MEMBAR between products: a fence beyond the block each time"]


def test_memory_is_not_reached_before_the_wait():
    rule = RULES[0]
    kernel = kernel_of(rule, rule.registers)
    for name, told in (("LDGSTS", 0), ("LDGDEPBAR", 0), ("LDG", 1), ("STG", 1), ("LDS", 0), ("ATOMS", 0), ("RED", 1)):
        early = [Instruction(-16, name, "", "")]
        kernel.code = early + kernel.code
        assert len([what for what in violations(kernel, "sm_90a") if "before the wait" in what]) == told
        kernel.code = kernel.code[1:]


@pytest.mark.parametrize("code", ["C7508", "C7510", "C7515"])
def test_warnings_of_slow_code_are_known(code):
    assert SLOW_WARNINGS.search(f"ptxas info : ({code}) Potential Performance Loss")


def test_warnings_without_a_number_are_known_too():
    for line in (
        "ptxas info : Potential Performance Loss: wgmma.mma_async instructions are serialized due to insufficient "
        "register resources",
        "ptxas info : setmaxnreg ignored to maintain minimum register requirement",
    ):
        assert SLOW_WARNINGS.search(line)
