"""Texts as the compiler writes them for a kernel, cut down to a line of each kind: a bad kernel, with one of every fault."""

PTX = """
.version 9.0
.target sm_90a
.visible .entry body_mosaic_gpu_kernel()
.maxntid 384, 1, 1
{
  setmaxnreg.inc.sync.aligned.u32 224;
  setmaxnreg.dec.sync.aligned.u32 56;
  wgmma.fence.sync.aligned;
  wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%r1}, %rd1, %rd2, 1;
  wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%r1}, %rd1, %rd2, 1;
  wgmma.commit_group.sync.aligned;
  cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%r1], [%rd3, {%r2}], [%r3];
  cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%r1], [%rd3, {%r2}], [%r3];
  cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%rd3], 256, [%r3];
  cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%rd1, {%r1}], [%r2];
}
"""
PTXAS = """
ptxas info    : Compiling entry function 'body_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : Function properties for body_mosaic_gpu_kernel
    40 bytes stack frame, 60 bytes spill stores, 92 bytes spill loads
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to non wgmma instructions
ptxas info    : Used 168 registers, used 16 barriers, 1 bytes smem
"""
MEMORY = "Resources(smem_scratch_bytes=166912, tmem_scratch_cols=384, tmem_collective_scratch_cols=128, barrier_counts=Counter())"
PROGRAM = """
HloModule jit_forward

%fused_pad (p: bf16[1,9,17,2,64]) -> bf16[1,9,18,2,64] {
  %p = bf16[1,9,17,2,64]{4,3,2,1,0} parameter(0)
  ROOT %pad.1 = bf16[1,9,18,2,64]{4,3,2,1,0} pad(%p, %zero), padding=0_0x0_0x0_1x0_0x0_0
}

ENTRY %main (q: bf16[1,9,17,2,64], k: bf16[1,9,18,2,64]) -> (bf16[1,9,18,2,64], f32[1,9,18,2]) {
  %q = bf16[1,9,17,2,64]{4,3,2,1,0} parameter(0)
  %k = bf16[1,9,18,2,64]{4,3,2,1,0} parameter(1)
  %pad.2 = bf16[1,9,18,2,64]{4,3,2,1,0} fusion(%q), kind=kLoop, calls=%fused_pad, metadata={op_name="jit(forward)/pad_to_dilation/pad"}
  %bitcast.1 = bf16[1,9,18,128]{3,2,1,0} bitcast(%pad.2)
  %mpmd_map.3 = (bf16[1,9,18,128]{3,2,1,0}, f32[1,2,4,64]{3,2,1,0}) custom-call(%bitcast.1, %k), custom_call_target="mosaic_gpu_v2"
  %out = bf16[1,9,18,128]{3,2,1,0} get-tuple-element(%mpmd_map.3), index=0
  %lse = f32[1,2,4,64]{3,2,1,0} get-tuple-element(%mpmd_map.3), index=1
  %rows = f32[1,9,18,2]{3,2,1,0} fusion(%lse), kind=kLoop, calls=%fused_transpose
  %mean = f32[] fusion(%out), kind=kInput, calls=%fused_mean
  %copy.1 = f16[4]{0} copy(%constant)
  ROOT %tuple = (bf16[1,9,18,128]{3,2,1,0}, f32[1,9,18,2]{3,2,1,0}) tuple(%out, %rows)
}
"""
FILES = {"ptx": PTX, "ptxas": PTXAS, "memory": MEMORY, "program": PROGRAM}
