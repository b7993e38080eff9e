"""What plans remember of compiled programs: the same numbers, of the same program alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from planning.test_hlo import GROUPED

from jlrm.planning import counting, remembered, slices


@pytest.fixture
def compiled(tmp_path, monkeypatch):
    """Return how often something was compiled, which is remembered in a cache of its own."""
    monkeypatch.setenv("JLRM_CACHE", str(tmp_path))
    compile_, times = slices._compile, list[int]()

    def counted(*given):
        times.append(1)
        return compile_(*given)

    monkeypatch.setattr(slices, "_compile", counted)
    return times


def planned(width: int = 8, about: str = "v5e:2x2", assumed=None, program=jnp.tanh):
    x = jax.ShapeDtypeStruct((4, width), jnp.float32)
    return slices.compile_program(jax.jit(program), (x,), assumed or {}, is_tpu=False, about=about)


def test_a_program_is_compiled_once(compiled):
    first, again = planned(), planned()
    assert len(compiled) == 1 and first.output_shardings is not None
    assert again == first._replace(output_shardings=None)


def test_what_may_change_the_numbers_is_another_program(compiled, monkeypatch):
    planned()
    planned(width=16)
    planned(program=jnp.sin)
    planned(about="v5e:2x4")
    planned(assumed={"body": (3,)})
    planned(program=jax.named_scope("a loop counted otherwise")(jnp.tanh))
    monkeypatch.setattr(slices, "versions", lambda is_tpu: {"jax": "0.0.0"})
    planned()
    monkeypatch.setenv("XLA_FLAGS", "--xla_other=1")
    planned()
    monkeypatch.setattr(remembered.inspect, "getsource", lambda module: "counts otherwise")
    planned()
    assert len(compiled) == 9


def test_nothing_is_remembered_of_devices_that_have_no_name(compiled):
    assert planned(about="").output_shardings is not None
    assert planned(about="").output_shardings is not None and len(compiled) == 2


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"counts": {"total": {"x": 1}}}', b'{"counts": null}']
)
def test_a_file_that_can_not_be_read_is_written_anew(compiled, tmp_path, content):
    first = planned()
    (file,) = (tmp_path / "plans").iterdir()
    file.write_bytes(content)
    assert planned().argument == first.argument and len(compiled) == 2
    assert planned().argument == first.argument and len(compiled) == 2


def test_a_cache_that_can_not_be_written_keeps_nothing(compiled, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("JLRM_CACHE", str(tmp_path / "file"))
    assert planned().argument == planned().argument and len(compiled) == 2


def test_counts_come_back_as_they_were(tmp_path):
    text = GROUPED.replace("KERNEL", "gmm")
    text = text.replace("TARGET", 'custom_call_target="tpu_custom_call"')
    program = counting.analyse(text, num_experts=4)
    program.loops.append((3, program.total))
    program.total.move("all-gather", 2, 64, 0)
    remembered.keep(tmp_path / "plans" / "one.json", {"counts": program, "temp": 7})
    assert remembered.recall(tmp_path / "plans" / "one.json") == {"counts": program, "temp": 7}
