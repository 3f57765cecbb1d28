import dataclasses
import json
import re

import pytest

from hqclip_jax import config as config_lib
from hqclip_jax import plan as plan_lib
from hqclip_jax import planner
from hqclip_jax.config import Config, MeshConfig, ModelConfig, OptimConfig, validate
from hqclip_jax.hlo import BETWEEN_SLICES
from hqclip_jax.planner import make_plan

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
    # What so small a step wants of the peak is far beyond what the compiler thinks possible.
    assert found["step_s"] == found["compiler_s"]
    assert found["step_s"] > found["flops_per_step"] / (4 * 197e12 * 0.5)
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
    assert "8 chips (8xH200): fits by formula" in out.replace("\n", " ")
    assert "formula: activations" in out


@pytest.mark.parametrize(
    ("batch", "says", "status"),
    [(2**14, "fits by formula", 0), (2**16, "too close to tell by formula", 0),
     (2**17, "does not fit by formula", 1)],
)  # fmt: skip
def test_a_formula_has_a_verdict_too(capsys, batch, says, status):
    question = [
        "--config=configs/large.py", "--topology=8xH200", "--config.model.remat=full",
        f"--config.optim.batch={batch}",
    ]  # fmt: skip
    assert plan_lib.main(question) == status
    assert f": {says}, " in " ".join(capsys.readouterr().out.split())


def test_epochs_need_a_number_of_records(capsys):
    question = ["--config=configs/grocery.py", "--topology=8xH200", "--json"]
    assert plan_lib.main(question) == 2
    assert "optim.duration='8 epochs' depends on the data set: add --records=N" in (
        capsys.readouterr().err
    )
    assert plan_lib.main([*question, "--records=2640"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 165


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--topology=v9:2x2"], "write a generation"),
        (["--topology=v5e:2x2", "--config.mesh.fsdp=8"], "with mesh.replica=-1 these do"),
        (["--topology=v5e:2x2", "--config.optim.micro_batches=3"], "optim.micro_batches = 12"),
        (["--topology=1xH200", "--search", "--config.mesh.tensor=2"], "more than the 1 chips"),
        # Of every mesh that a search would try; not a matter of memory.
        (["--topology=v5e:2x2", "--search", "--config.optim.batch=3"], "is not divisible"),
    ],
)
def test_a_wrong_question_is_refused_with_a_right_one(capsys, options, message):
    status, _, error = run(capsys, *options)
    assert status == 2
    assert message in error


@pytest.mark.parametrize("option", ["--mfu=40", "--mfu=0", "--mfu=x", "--slices=0", "--search=-1"])
def test_a_number_out_of_range_is_refused(capsys, option):
    with pytest.raises(SystemExit):
        run(capsys, "--topology=v5e:2x2", option)
    assert "is not a" in capsys.readouterr().err


def test_search_drops_what_cannot_fit_and_ranks_the_rest(capsys, monkeypatch):
    compiled = []

    def by_formula(config, topology, mfu, slices=1, compile_it=True, abstract=None):
        compiled.append(make_plan(config, topology, mfu, slices, False, abstract))
        return compiled[-1]

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
        assert plan["config"]["model"]["remat"] != "none" or (
            plan["config"]["optim"]["micro_batches"] > 1
        )


def test_what_was_found_is_ranked_by_the_compiler(capsys, monkeypatch):
    seconds = iter([3.0, 1.0, 2.0])

    def as_compiled(config, topology, mfu, slices, compile_it):
        plan = make_plan(config, topology, mfu, slices, False)
        sends = {
            "all-gather": (1, int(0.25 * plan.chip.link)),
            BETWEEN_SLICES: (1, int(0.5 * plan.chip.network)),
        }
        return dataclasses.replace(
            plan, fits=True, hbm_gib=9.0, compiler_s=next(seconds), compile_s=1.0, sends=sends
        )

    monkeypatch.setattr(plan_lib, "make_plan", as_compiled)
    question = ["--config=configs/xlarge.py", "--topology=v5e:16x16", "--search"]
    assert plan_lib.main(question) == 0
    printed = capsys.readouterr().out
    estimates = re.findall(r"([\d.]+) s +│$", printed[printed.index("fastest first") :], re.M)
    assert estimates[:3] == ["1.75", "2.75", "3.75"]
    assert printed.count("a chip's collectives") == 1  # all of the fastest, a line of the others


def test_what_takes_more_than_one_that_was_refused_is_not_tried(capsys, monkeypatch):
    config = config_lib.load("configs/xlarge.py", {})
    base = make_plan(config, "v5e:16x16", 0.4, compile_it=False)

    def candidate(parts: int, gib: float) -> planner.Plan:
        optim = dataclasses.replace(config.optim, micro_batches=parts)
        changed = dataclasses.replace(config, optim=optim)
        return dataclasses.replace(base, config=changed, formula_gib={"parameters": gib})

    possible = [candidate(1, 10), candidate(2, 12), candidate(4, 8), candidate(8, 9)]
    tried = []

    def as_compiled(config, *_):
        tried.append(config.optim.micro_batches)
        if tried[-1] == 8:
            raise KeyboardInterrupt
        plan = candidate(config.optim.micro_batches, 0)
        return dataclasses.replace(plan, fits=tried[-1] != 1, hbm_gib=9.0, compile_s=1.0)

    monkeypatch.setattr(plan_lib, "candidates", lambda *_: possible)
    monkeypatch.setattr(plan_lib, "make_plan", as_compiled)
    question = ["--config=configs/xlarge.py", "--topology=v5e:16x16", "--search", "--json"]
    assert plan_lib.main(question) == 0
    assert tried == [1, 4, 8]
    # What was found before Ctrl-C is not lost.
    assert len(json.loads(capsys.readouterr().out)["plans"]) == 1


def test_search_by_formula_compiles_nothing(capsys, monkeypatch):
    monkeypatch.setattr(planner, "compile_step", None)
    question = ["--config=configs/xlarge.py", "--topology=v5e:16x16", "--search", "--formula"]
    assert plan_lib.main(question) == 0
    printed = capsys.readouterr().out
    assert "fastest first" in printed
    # By formula a copy on each chip takes 17 GiB; with a compiler to ask it would be tried.
    assert "mesh.fsdp=1 " not in printed


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


def test_what_slices_send_each_other_is_found_in_the_compiled_step(capsys):
    status, out, _ = run(
        capsys, "--topology=v5e:2x2", "--slices=2", "--json", "--config.mesh.fsdp=4"
    )
    found = json.loads(out)
    parameters = found["formula_gib"]["parameters"] * 2**30
    assert (status, found["slices"]) == (0, 2)
    # At least a chip's share of the gradients, in bf16.
    assert found["sends"][BETWEEN_SLICES]["bytes"] > parameters / 2


def test_small_nodes_are_nodes_too():
    config = config_lib.load("configs/large.py", {"mesh.fsdp": "4"})
    assert make_plan(config, "4xH200", 0.4, slices=2).slices == 2
    assert make_plan(config, "16xH200", 0.4).slices == 2


def test_a_copy_of_the_model_that_spans_nodes_is_reckoned_at_their_network_s_speed():
    def estimate(fsdp: int) -> float:
        config = config_lib.load("configs/large.py", {"mesh.fsdp": str(fsdp)})
        plan = make_plan(config, "16xH100", 0.4)
        assert plan.slices == 2
        return plan.estimate_s

    # 150M parameters in bf16, gathered twice and reduced; at 50 instead of 450 GB/s.
    expected = 4 * 2 * 150e6 * (1 / 50e9 - 1 / 450e9)
    assert estimate(16) - estimate(8) == pytest.approx(expected, rel=0.2)
