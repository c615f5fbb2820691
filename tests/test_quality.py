"""Languages and the marks of text gone wrong, each on texts that have them and on texts that only look so."""

import subprocess
import sys
import time

import pytest

from finetune.data.quality import FLAGS, flags, language

PROSE = (
    "The court held that the agreement was not enforceable because consideration had failed. In reaching this "
    "conclusion it looked at the time that had gone by, at the conduct of the parties and at the terms that they had "
    "signed. A buyer would have inspected the goods within a month; this one waited three years and then wrote."
)

HAS = {
    "repetition": [
        "Buy now and save more today! " * 12,
        "click here\n" * 5 + "Something else stands here.",
        PROSE + " " + "and so on and on again" + " and so on and on again" * 30 + ".",
    ],
    "symbols": ["=== 12.5 / 33 % -- ## || 17:20 ++ ** $$", "0x1f 0x2e 0x3d 0x4c 0x5b 12 13 14"],
    "mojibake": [
        "Le cafÃ© est fermÃ©.",
        "Donâ€™t do that.",
        "Ã‰tat des lieux",
        "Stra\u00c3\u0178e",
        "10Â\u00a0km",
        "lost \ufffd here",
        "Привет".encode().decode("cp1252"),
    ],
    "markup": [
        "<p>Hello</p>",
        "one<br/>two",
        'see <a href="x">this</a>',
        "fish&nbsp;chips",
        "&#8217;",
        "a `code` and </div>",
        "&#x2019;",
    ],
    "capitals": ["THIS AGREEMENT IS MADE BY THE PARTIES BELOW.", "CLICK HERE NOW TO WIN A Free CAR"],
    "refusal": [
        "I'm sorry, but I can't help with that.",
        "I\u2019m really sorry, but I cannot provide this.",
        "As an AI language model, I have no opinions.",
        "Sorry, I can't do this.",
        "I cannot assist with that request.",
        "Unfortunately, I am unable to provide medical advice.",
        '"I am unable to help you with this."',
        "I apologize, but I'm not able to write that.",
    ],
    "cut": [
        PROSE[:-1],
        PROSE[:-9],
        PROSE + " Moreover,",
        PROSE + "\n```python\nprint(1)\n",
        "这" * 201,
    ],
}

LACKS = {
    "repetition": [
        PROSE,
        "ha ha ha ha ha ha ha ha",
        "Yes.\nNo.\nYes.",
        "one line\nsays it\nonce",
        "we hold that the claim is out of time. " * 2 + PROSE,
    ],
    "symbols": [PROSE, "42", "3 + 4 = 7", "def f(x): return [x + 1, x * 2]", "नमस्ते दुनिया, आप कैसे हैं? मैं ठीक हूँ।"],
    "mojibake": ["Le café, l\u2019État, Straße, “NÃO”, 10\u00a0km, Привет, Þórður, Â", "ÂGE, MAÇÃ”, São"],
    "markup": [
        "if a < b and c > d: pass",
        "List<int> x; R&D, AT&T",
        "Use `<br>` for a break.",
        "```html\n<p>Hi</p>\n```\nDone.",
        "<think> so",
    ],
    "capitals": [
        PROSE,
        "NATO AND THE UN",
        "AB-1234567 CD-7654321 EF-1111222 to x",
        "IBM, DNA, HTML and USB are abbreviations that one meets in such a text.",
    ],
    "refusal": [
        PROSE,
        "I'm sorry to hear that. Rest helps.",
        "I can't believe how well it went!",
        "AI cannot do this.",
        "As an aid to memory, write it down.",
        "She said: I'm sorry, but I can't help.",
        "Sorry for the delay.",
    ],
    "cut": [
        PROSE,
        PROSE[:150],
        PROSE + "\n\n- first item of the list that is rather long and has no full stop at its end",
        PROSE + "\n\nA heading",
        PROSE + " See https://example.org/a/b",
        PROSE + "”",
        PROSE + "\n```\nx = 1\n```",
        PROSE + " 🙂",
        "สวัสดีครับ" * 30,
        "判" * 201 + "。",
    ],
}


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in HAS.items() for text in texts])
def test_a_text_gone_wrong_is_flagged(name, text):
    assert name in flags(text)


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in LACKS.items() for text in texts])
def test_a_text_that_only_looks_so_is_not(name, text):
    assert name not in flags(text)


def test_every_flag_has_texts_with_and_without_it_and_they_come_in_one_order():
    assert list(HAS) == list(LACKS) == list(FLAGS)
    text = "<B>CLICK HERE NOW</B>\n" * 20 + "FOR cafÃ©"
    assert flags(text) == ["repetition", "mojibake", "markup", "capitals"]


def test_plain_prose_and_the_empty_text_have_no_flag():
    assert flags(PROSE) == flags("") == flags(" \n ") == []


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("en", PROSE),
        ("de", "Das Gericht hielt den Vertrag für unwirksam, weil die Gegenleistung ausgeblieben war."),
        ("fr", "Le tribunal a jugé que le contrat n'était pas valable, faute de contrepartie."),
        ("es", "El tribunal consideró que el contrato no era válido porque faltaba la contraprestación."),
        ("pl", "Sąd uznał, że umowa jest nieważna, ponieważ nie było świadczenia wzajemnego."),
        ("ru", "Суд постановил, что соглашение не имеет силы, так как не было встречного исполнения."),
        ("zh", "法院认为该合同不可执行\uff0c因为对价已经失败。在得出这一结论时\uff0c法院考虑了时间的推移。"),
        ("ar", "رأت المحكمة أن العقد غير قابل للتنفيذ لأن المقابل لم يتحقق في الوقت المحدد."),
    ],
)
def test_the_language_of_a_sentence_is_told(code, text):
    assert language(text) == code


def test_a_text_of_fewer_than_20_letters_has_no_language():
    assert language("Das war ein kurzer Satz") == ""  # 19 letters
    assert language("12345 67890 " * 20 + "Guten Tag") == ""
    assert language("Das war ein kurzer Absatz") == "de"  # 21


def test_only_the_first_600_characters_tell_the_language():
    german = "Der Vertrag war nach Ansicht des Gerichts unwirksam, weil die Gegenleistung ausgeblieben war. " * 7
    assert language(german + PROSE * 100) == language(german[:600]) == "de"


def test_the_model_is_loaded_once_and_only_when_a_language_is_asked_for():
    from finetune.data.quality import _identifier

    assert _identifier() is _identifier()
    code = "import sys; import finetune.data.quality; print('py3langid' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]


@pytest.mark.parametrize(
    "piece", ["a", "a ", " ", "\n", "<a ", "`", "``` a", "&", "Ã", "sorry ", "1 ", "A b\n", "as an "]
)
def test_a_megabyte_of_one_thing_takes_seconds_at_most(piece):
    text = piece * (1_000_000 // len(piece))
    begun = time.process_time()
    flags(text)
    language(text)
    assert time.process_time() - begun < 12  # quadratic work would take hours
