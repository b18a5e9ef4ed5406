"""The gate over compiled CUDA kernels finds what it is there to find."""

from __future__ import annotations

import pytest
from cuda_gate import RULES, SLOW_WARNINGS, Kernel, read_report, read_sass, violations

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


def test_reads_registers_spills_and_instructions():
    (kernel,) = read_report(REPORT).values()
    assert (kernel.registers, kernel.spilled, kernel.stack) == (128, 12, 16)
    assert read_sass(SASS) == {kernel.name: {"LDC", "LDGSTS", "LDGSTS.128", "HMMA", "STL"}}


def test_every_broken_rule_is_told():
    (kernel,) = read_report(REPORT).values()
    kernel.instructions = read_sass(SASS)[kernel.name]
    told = "; ".join(violations(kernel, "sm_90a"))
    for what in ("spills 12 bytes, stack of 16", "128 registers, at most 112", "no LDSM", "no ACQBULK", "has STL"):
        assert what in told
    assert "ACQBULK" not in "; ".join(violations(kernel, "sm_80"))
    assert "no rule" in violations(Kernel("_Z7unknown"), "sm_80")[0]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_a_kernel_within_its_rule_passes(rule):
    assert violations(Kernel(rule.name, rule.registers, instructions={*rule.required, *rule.hopper}), "sm_90a") == []


def test_registers_that_warpgroups_share_out_have_one_number():
    rule = next(rule for rule in RULES if rule.exact)
    fewer = Kernel(rule.name, rule.registers - 8, instructions={*rule.required, *rule.hopper})
    assert violations(fewer, "sm_90a") == ["160 registers, exactly 168 have to be"] and not violations(fewer, "sm_80")


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
