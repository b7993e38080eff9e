"""What is read from the compiler's text: groups of devices, and messages of a full memory."""

from __future__ import annotations

import pytest

from jlrm.planning import counting, hlo, slices
from jlrm.planning.slices import GIB


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'b'}, x=1", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}, x=1", [[0, 2], [1, 3]]),
        ("source_target_pairs={{0,3},{3,0}}", [[0, 3], [3, 0]]),
    ],
)
def test_replica_groups(text, groups):
    assert list(hlo.replica_groups(text)) == groups


GROUPED = """HloModule jit_f, is_scheduled=true

ENTRY %main (rows: bf16[64,16], experts: bf16[4,16,8], gradient: bf16[64,8]) -> bf16[4,16,8] {
  %rows = bf16[64,16]{1,0} parameter(0)
  %experts = bf16[4,16,8]{2,1,0} parameter(1)
  %gradient = bf16[64,8]{1,0} parameter(2)
  %KERNEL.1 = bf16[64,8]{1,0} custom-call(%rows, %experts), TARGET
  %other = bf16[64,8]{1,0} custom-call(%rows, %experts), TARGET
  ROOT %tgmm = bf16[4,16,8]{2,1,0} custom-call(%rows, %gradient), TARGET
}
"""


@pytest.mark.parametrize("kernel", ["gmm", "transpose_jvp_jit_gmm__", "ragged-dot-none"])
@pytest.mark.parametrize(("num_experts", "share"), [(4, 1), (16, 1 / 4)])
def test_products_of_experts_are_counted_for_the_rows_that_a_device_runs(
    kernel, num_experts, share
):
    text = GROUPED.replace("KERNEL", kernel)
    text = text.replace("TARGET", 'custom_call_target="tpu_custom_call"')
    found = counting.analyse(text, num_experts=num_experts).total
    assert found.flops == share * 2 * (2 * 64 * 16 * 8) and found.kernels == 3
    matrices, rows, outputs = 2 * 4 * 16 * 8, 2 * 64 * 16, 2 * 64 * 8
    assert found.bytes == 3 * (matrices + rows + outputs)


@pytest.mark.parametrize(
    ("message", "gib"),
    [
        (
            "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total "
            "memory required for HLO temporaries (19.50G) exceeds available HBM (15.75G).",
            19.5,
        ),
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory "
            "space hbm. Used 21.50G of 15.48G hbm. Exceeded hbm capacity by 6.02G.",
            21.5,
        ),
        ("Ran out of memory in memory space hbm. Used 512.00M of 256.00M hbm.", 0.5),
        ("Ran out of memory in memory space vmem. Used 32.42M of 16.00M vmem.", 0),
        ("INVALID_ARGUMENT: Mosaic failed to compile TPU kernel", None),
    ],
)
def test_messages_of_a_full_memory(message, gib):
    read = slices.overflow(message)
    assert read is None if gib is None else read == gib * GIB
