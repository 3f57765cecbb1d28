import dataclasses
import json
import re

import pytest

from hqclip_jax import plan as plan_lib
from hqclip_jax.config import Config, MeshConfig, ModelConfig, OptimConfig, validate
from hqclip_jax.plan import make_plan

TINY = [
    "--config=configs/demo.py", "--config.model.image_size=16", "--config.model.context_length=8",
    "--config.model.unroll=1", "--config.model.dtype=bfloat16",
]  # fmt: skip


def run(capsys, *options: str) -> tuple[int, str, str]:
    status = plan_lib.main([*TINY, *options])
    return status, *capsys.readouterr()


def test_the_step_is_compiled_for_a_pod_that_is_not_there(capsys):
    status, out, _ = run(
        capsys, "--topology=v5e:2x2", "--json", "--mfu=0.5", "--config.mesh.fsdp=2"
    )
    found = json.loads(out)
    assert status == 0
    assert found["fits"] is True
    assert 0 < found["hbm_gib"] < 1
    assert found["mesh"] == {"replica": 2, "fsdp": 2, "tensor": 1}
    assert found["memory_gib"]["temporaries"] > 0
    assert found["sends"]["all-gather"]["bytes"] > 0
    assert "all-to-all" not in found["sends"]
    assert found["flops_per_step"] == pytest.approx(sum(found["flops"].values()))
    assert found["step_s"] == pytest.approx(found["flops_per_step"] / (4 * 197e12 * 0.5))
    assert found["steps"] == 375
    assert found["chip_hours"] == pytest.approx(375 * found["step_s"] * 4 / 3600)


def test_what_is_too_large_does_not_fit_and_says_how_much_it_wanted(capsys):
    status, out, _ = run(
        capsys, "--topology=v5e:2x2", "--json", "--config.optim.batch=4194304",
        "--config.model.remat=full",
    )  # fmt: skip
    found = json.loads(out)
    assert status == 1
    assert found["fits"] is False
    assert found["hbm_gib"] > 15.75
    assert "memory" in found["note"]


def test_gpus_are_reckoned_by_formula_and_it_is_said_why(capsys):
    status, out, _ = run(capsys, "--topology=8xH200")
    assert status == 0
    assert "XLA can't compile for a GPU that is not there" in out
    assert "8 chips (8xH200): not compiled" in out.replace("\n", " ")
    assert "formula: activations" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--topology=v9:2x2"], "write a generation"),
        (["--topology=v5e:2x2", "--config.mesh.fsdp=3"], "with mesh.replica=-1 these do"),
        (["--topology=v5e:2x2", "--config.optim.micro_batches=3"], "optim.micro_batches = 12"),
    ],
)
def test_a_wrong_question_is_refused_with_a_right_one(capsys, options, message):
    status, _, error = run(capsys, *options)
    assert status == 2
    assert message in error


def test_search_drops_what_cannot_fit_and_ranks_the_rest(capsys, monkeypatch):
    compiled = []

    def by_formula(config, topology, mfu, slices=1, compile_it=True, abstract=None):
        plan = make_plan(config, topology, mfu, slices, False, abstract)
        if compile_it:
            compiled.append(plan)
        return plan

    monkeypatch.setattr(plan_lib, "make_plan", by_formula)
    status = plan_lib.main(
        ["--config=configs/xlarge.py", "--topology=v5e:16x16", "--search=2", "--json"]
    )
    found = json.loads(capsys.readouterr().out)["plans"]
    assert status == 0
    assert len(found) == len(compiled) == 2
    for plan in found:
        assert sum(plan["formula_gib"].values()) < 1.3 * 15.75
        # 352 images a chip of a ViT-L/14 without any remat are far too many.
        assert plan["config"]["remat"] != "none" or plan["config"]["micro_batches"] > 1


def test_what_was_found_is_ranked_by_the_compiler(capsys, monkeypatch):
    seconds = iter([3.0, 1.0, 2.0])

    def as_compiled(config, topology, mfu, slices=1, compile_it=True, abstract=None):
        plan = make_plan(config, topology, mfu, slices, False, abstract)
        if not compile_it:
            return plan
        sends = {"all-gather": (1, int(0.25 * plan.chip.link))}
        return dataclasses.replace(
            plan, fits=True, hbm_gib=9.0, compiler_s=next(seconds), sends=sends
        )

    monkeypatch.setattr(plan_lib, "make_plan", as_compiled)
    question = ["--config=configs/xlarge.py", "--topology=v5e:16x16", "--search"]
    assert plan_lib.main(question) == 0
    printed = capsys.readouterr().out
    estimates = re.findall(r"([\d.]+) s +│$", printed[printed.index("fastest first") :], re.M)
    assert estimates[:3] == ["1.25", "2.25", "3.25"]
    assert printed.count("a chip's collectives") == 1  # all of the fastest, a line of the others


def test_search_by_formula_compiles_nothing(capsys, monkeypatch):
    monkeypatch.setattr(plan_lib, "compile_step", None)
    question = ["--config=configs/xlarge.py", "--topology=v5e:16x16", "--search", "--formula"]
    assert plan_lib.main(question) == 0
    printed = capsys.readouterr().out
    assert "fastest first" in printed
    # By formula a copy on each chip takes 17 GiB; with a compiler to ask it would be tried.
    assert "fsdp=1 " not in printed


def test_a_copy_on_each_slice():
    config = validate(
        Config(
            model=ModelConfig(arch="ViT-Pico/8", image_size=16, context_length=8),
            optim=OptimConfig(batch=64),
            mesh=MeshConfig(fsdp=4),
        )
    )
    plan = make_plan(config, "v5e:2x2", 0.4, slices=2, compile_it=False)
    assert (plan.chips, plan.mesh["replica"]) == (8, 2)
    assert plan.topology == "2 × v5e:2x2"
