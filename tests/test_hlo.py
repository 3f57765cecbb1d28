import jax
import jax.numpy as jnp

from hqclip_jax.config import MeshConfig
from hqclip_jax.hlo import BETWEEN_SLICES, collectives, estimated_cycles
from hqclip_jax.sharding import P, make_mesh

# A loop of 5 turns that gathers 8 × 16 bf16 and permutes asynchronously, a sum of two arrays after
# it, and one collective that the compiler has woven into two fusions under one channel. Then sums
# scattered over two devices, and what is left of them over the other two, and over groups in other
# notations; two alike that JAX gave one channel; and what two slices send.
# ruff: noqa: E501
PROGRAM = """\
HloModule jit_step

%condition.1 (p: (s32[], bf16[8,16])) -> pred[] {
  %limit = s32[]{:T(128)} constant(5)
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

%body.1 (p: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %g = bf16[8,16]{1,0} all-gather(%x), channel_id=1, dimensions={0}
  %s = (f32[4]{0}, f32[4]{0}, u32[], u32[]) collective-permute-start(%y), channel_id=2
  %d = f32[4]{0} collective-permute-done(%s)
  %q = bf16[3]{0} collective-permute(%y), channel_id=2
}

%all-reduce-scatter.1 (p: f32[10]) -> f32[5] {
  %r = f32[10]{0} all-reduce(%p), channel_id=4, to_apply=%add
}

%fused.1 (p: f32[2]) -> f32[4] {
  %a = f32[4]{0} all-gather(%p), channel_id=3
}

%fused.2 (p: f32[2]) -> f32[4] {
  %b = f32[4]{0} all-gather(%p), channel_id=3
}

ENTRY %main (p: f32[2]) -> f32[] {
  %w = (s32[], bf16[8,16]) while(%t), condition=%condition.1, body=%body.1
  %f1 = f32[4]{0} fusion(%p), kind=kCustom, calls=%fused.1
  %f2 = f32[4]{0} fusion(%p), kind=kCustom, calls=%fused.2
  %f3 = f32[5]{0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1
  %sum = (f32[3]{0}, bf16[2]{0}) all-reduce(%f1, %f2), channel_id=5, to_apply=%add
  %as = ((bf16[2]{0}, f32[1]{0}), (bf16[8]{0}, f32[4]{0})) all-gather-start(%f1, %f2), channel_id=6
  %s1 = f32[6]{0} reduce-scatter(%f1), channel_id=7, replica_groups={{0,1},{2,3}}, to_apply=%add
  %s2 = f32[3]{0} reduce-scatter(%s1), channel_id=7, replica_groups=[2,2]<=[2,2]T(1,0)
  %s3 = f32[7]{0} reduce-scatter(%s1), channel_id=10, replica_groups={{0,1,2}}, to_apply=%add, frontend_attributes={{"x"}}
  %s4 = f32[1]{0} reduce-scatter(%s1), channel_id=11, replica_groups=mesh['a'=2,'b'=4,'c'=3], device_ids=([8]T(1,0)) {'a','c'}, dimensions={0}
  %t1 = f32[2]{0} all-gather(%p), channel_id=1, replica_groups={{0,1}}
  %t2 = f32[2]{0} all-gather(%q), channel_id=1, replica_groups={{0,1}}
  %out = (f32[6]{0}, u32[], token[]) send(%s1, %t), channel_id=8, is_host_transfer=true, frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
  %in = (f32[6]{0}, u32[], token[]) recv(%t), channel_id=9, is_host_transfer=true, frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
}
"""


def test_loops_count_as_often_as_they_run_and_woven_collectives_once():
    assert collectives(PROGRAM) == {
        "all-gather": (5 + 1 + 1 + 2, 5 * 8 * 16 * 2 + 4 * 4 + 8 * 2 + 4 * 4 + 2 * 2 * 4),
        "collective-permute": (5 + 5, 5 * (4 * 4 + 3 * 2)),
        "reduce-scatter": (1 + 4, 10 * 4 + 2 * 6 * 4 + 2 * 3 * 4 + 3 * 7 * 4 + 6 * 4),
        "all-reduce": (1, 3 * 4 + 2 * 2),
        BETWEEN_SLICES: (1, 6 * 4),
    }


def test_cycles_count_by_operation_and_loop_and_not_again_inside_of_a_fusion():
    def noted(cycles: int) -> str:
        return f', backend_config={{"window_config":{{"estimated_cycles":"{cycles}"}}}}'

    program = PROGRAM.replace("channel_id=1, dimensions={0}", "channel_id=1" + noted(100))
    program = program.replace("(%p), channel_id=4", "(%p), channel_id=4" + noted(7))
    program = program.replace(
        "calls=%all-reduce-scatter.1", "calls=%all-reduce-scatter.1" + noted(11)
    )
    assert estimated_cycles(program) == 5 * 100 + 11
    assert estimated_cycles(PROGRAM) == 0


def test_a_compiled_loop_of_gathers():
    mesh = make_mesh(MeshConfig(), 8)

    def gather_often(x_b):
        def once(i, total):
            return total + jnp.sum(jax.lax.all_gather(x_b * i, "replica", tiled=True) ** 2)

        return jax.lax.fori_loop(0, 7, once, jnp.float32(0))

    summed = jax.shard_map(
        gather_often, mesh=mesh, in_specs=P("replica"), out_specs=P(), check_vma=False
    )
    text = jax.jit(summed).lower(jnp.ones(64)).compile().as_text()
    assert collectives(text)["all-gather"] == (7, 7 * 64 * 4)
