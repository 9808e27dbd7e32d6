"""What `tests/attention/racecheck.py` counts (it runs on a GPU)."""

from tests.attention.racecheck import dispatch_bytes, elsewhere, hazards

PTX = """
.reqntid 512
	st.shared.v2.b32 	[global_smem+232160], {0, 16843009};
	barrier.sync 	1;
	add.s32 	%r139, %r3573, %r3;
	ld.shared.b8 	%r138, [%r139+232156];
"""
REPORT = """
========= Error: Potential RAW hazard detected at __shared__ {address} in block (0,0,0) :
=========     Write Thread (0,0,0) at {kernel}+0x6b0
=========     Read Thread (128,0,0) at {kernel}+0x1a0
=========     Current Value : 0, Incoming Value : 0
"""


def test_dispatch_bytes_are_those_of_the_other_warps():
    assert dispatch_bytes(PTX) == range(232160, 232172)
    assert dispatch_bytes(PTX.replace("%r138", "%rs1").replace("512", "384")) == range(232160, 232168)
    assert not dispatch_bytes(PTX.replace("ld.shared.b8", "ld.shared.b32"))


def test_hazards_elsewhere_count():
    own, other = hex(1024 + 232160), hex(1024 + 232172)
    text = "DISPATCH attention_backward_q 232160 232172\n"
    text += REPORT.format(address=own, kernel="attention_backward_q") * 2
    assert hazards(text) == {("attention_backward_q", int(own, 16)): 2}
    assert not elsewhere(text)
    text += REPORT.format(address=other, kernel="attention_backward_q")
    text += REPORT.format(address=own, kernel="attention_forward")
    text += "========= Error: Potential RAW hazard detected at __shared__ 0x400 in block (0,0,0) :"
    assert elsewhere(text) == {
        ("attention_backward_q", int(other, 16)): 1,
        ("attention_forward", int(own, 16)): 1,
        ("?", 0x400): 1,
    }
