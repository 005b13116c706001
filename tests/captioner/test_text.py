"""A caption becomes plain sentences, and fits behind the user's text."""

from __future__ import annotations

import logging
import time

import pytest

from wan.captioner import clean_caption, compose_prompt, refusal
from wan.captioner.text import bounded, sentences, shortened
from wan.errors import UserError


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("<think>hm\nwell</think>\n\n**A cat** runs.", "A cat runs."),
        ("the template opened it</think>The dog sits.", "The dog sits."),
        ("<think>and never got to the point", ""),
        ("Frame1: A cat sits. Frame 2: the cat jumps.", "A cat sits. The cat jumps."),
        ("In Frame 3, a cat sits. It runs (Frames 4-6) away.", "A cat sits. It runs away."),
        ("The lens, from Frame 1 through Frame 8, zooms in.", "The lens zooms in."),
        ("The frame rate is 24. A frame hangs there.", "The frame rate is 24. A frame hangs there."),
        ("### Scene\n- A *red* car\n- Two `dogs`.\n\n1. They run!\n---\n", "Scene. A red car. Two dogs. They run!"),
        ("A snake_case word, a _soft_ one and a [link](http://x).", "A snake_case word, a soft one and a link."),
        ("One\x00 two\x1b\u200b three\tfour\r\nfive .", "One two three four five."),
        ("The end </s> is <|im_end|> not <ref>here</ref><box>[[1, 2]]</box>.", "The end is not here."),
        ("A whole one. And one that was cut o", "A whole one."),
        ("一只猫。它在跑！然后", "一只猫。它在跑！"),
        ("only a fragment", "only a fragment"),
        # what only looks like Markdown or a tag
        ("Where x<y and y>z, it costs $5*3*2.", "Where x<y and y>z, it costs $5*3*2."),
        ("A **bold** *soft* one, 2**3 is eight.", "A bold soft one, 2**3 is eight."),
        ("A <b>bold</b> one<br/> here.", "A bold one here."),
        ("a < b and c > d", "a < b and c > d"),
        # what is not prose keeps its words
        (
            "| Time | Action |\n|---|:---:|\n| 0-2 s | A car drives. |\n| 2-4 s | It stops |",
            "Time, Action. 0-2 s, A car drives. 2-4 s, It stops.",
        ),
        ('{"subject": "A red car", "moves": ["It turns.", "It stops"], "wheels": 4}', None),
        ('```json\n["A dog runs.", "It sits"]\n```', "A dog runs. It sits."),
        ("एक कुत्ता दौड़ता है। वह कूदता है। और फि", "एक कुत्ता दौड़ता है। वह कूदता है।"),
        ("<think>one</think><think>two</think>A cat sits.", "A cat sits."),
        # what is said again and again
        ("A red car drives. " * 50, "A red car drives."),
        ("A cat sits. It looks. A cat sits. It jumps.", "A cat sits. It looks. It jumps."),
        ("A red car, a red car, a red car, a red car.", "A red car."),
        ("He walks and walks and walks and walks away.", "He walks and walks away."),
        ("一只猫在跑。一只猫在跑。一只猫在跑。", "一只猫在跑。"),
        ("He says: no, no. She says: yes, yes.", "He says: no, no. She says: yes, yes."),
        # talk to the reader
        (
            "Sure! Here is a detailed description of the video: a boat turns.\n\nLet me know if you need more.",
            "A boat turns.",
        ),
        ("Certainly. The man is old. I hope this helps!", "The man is old."),
        ("好的，以下是视频的详细描述：一只猫在跑。希望这对您有帮助！", "一只猫在跑。"),
        (
            "Natürlich! Hier ist eine Beschreibung: Ein Boot wendet. Lass mich wissen, ob du mehr brauchst.",
            "Ein Boot wendet.",
        ),
        ("Bien sûr, voici une description : Un bateau tourne. N'hésitez pas à me demander.", "Un bateau tourne."),
        ("Here is a cat. It sleeps.", "Here is a cat. It sleeps."),
    ],
)
def test_caption_is_cleaned(raw: str, clean: str | None) -> None:
    clean = "A red car. It turns. It stops. wheels 4." if clean is None else clean
    assert clean_caption(raw) == clean
    assert clean_caption(clean) == clean


def test_what_is_left_out_of_a_loop_is_said(caplog: pytest.LogCaptureFixture) -> None:
    clean_caption("The sea is calm. " * 125)
    assert "the VLM repeats itself: 496 words of its answer are left out" in caplog.text


def test_a_long_answer_is_cleaned_in_no_time() -> None:
    start = time.perf_counter()
    for hostile in (
        "<" * 10**6,
        "frame 1, " * 10**5,
        "a " * 10**6,
        "*_" * 10**6,
        "[" * 10**6,
        "| " * 10**6,
        "{" * 10**6,
    ):
        clean_caption(hostile)
        refusal(hostile)
    assert time.perf_counter() - start < 10


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't assist with that request.",
        "I’m sorry, I cannot describe this video.",
        "Sorry, can't help with that.",
        "<think>unsafe</think> I cannot provide a description of this content.",
        "As an AI language model, I cannot view videos. However, if you describe it, I can help.",
        "Unfortunately, I am unable to view the frames. Please provide another video.",
        "I must decline to answer. Please share something else.",
        "No video was provided. Please upload one.",
        "很抱歉，我无法描述该视频。",
        "Es tut mir leid, dabei kann ich nicht helfen.",
        "Ich kann diese Anfrage leider nicht beantworten.",
        "Je suis désolé, mais je ne peux pas vous aider.",
        "Lo siento, no puedo ayudar con eso.",
        "Desculpe, não posso ajudar com isso.",
        "Mi dispiace, ma non posso aiutarti.",
        "申し訳ありませんが、その動画を説明することはできません。",
        "죄송하지만 도와드릴 수 없습니다.",
        "Извините, но я не могу помочь с этим.",
        "I apologize, however there is no video attached.",
        "It seems that no video has been provided. Could you upload it?",
        "I don't see any uploaded video. Can you try again?",
        '{"error": "I am sorry, I cannot help with this request."}',
        "<Thinking>a person</Thinking>\n¡Lo siento! No puedo ayudar con eso.",
        "すみません、そのご依頼にはお応えできません。",
        "Niestety nie mogę pomóc w tej sprawie.",
        "Het spijt me, dit verzoek kan ik niet uitvoeren.",
        "Maalesef bu isteği yerine getiremem.",
        "عذرًا، لا يمكنني المساعدة في هذا الطلب.",
        "मुझे खेद है, मैं इस अनुरोध में सहायता नहीं कर सकता।",
        "Tôi xin lỗi, tôi không thể giúp việc này.",
        "Mohon maaf, saya tidak bisa membantu permintaan ini.",
        "ต้องขออภัย ไม่สามารถช่วยเรื่องนี้ได้",
        "На жаль, я не можу допомогти з цим.",
        "Jag kan tyvärr inte hjälpa till med det.",
        "Bohužel nemůžu s tímto pomoci.",
        "Δυστυχώς, δεν μπορώ να βοηθήσω σε αυτό.",
        "אני לא יכול לעזור בזה.",
        "متأسفم، من نمی‌توانم کمک کنم.",
        "As a text-based AI, I can't view videos.",
        "This content violates our policy.",
        "Request blocked by content filter.",
        "I'd rather not describe this.",
        "Nem tudok segíteni ebben.",
        "క్షమించండి, నేను సహాయం చేయలేను.",
        "誠に恐れ入りますが、この動画の内容を説明することはできかねます。",
        "ご要望にはお応えできません。",
        "What would you like me to describe?",  # of which nothing would stay
        "Please provide the video frames so that I can describe them.",
    ],
)
def test_a_refusal_is_known(text: str) -> None:
    assert refusal(text) is not None


@pytest.mark.parametrize(
    "text",
    [
        "A man says sorry and walks away.",
        "The cat can't reach the shelf. It cannot see the mouse.",
        "Unfortunately for the cat, the shelf can't be reached by it, and it falls to the floor.",
        "I can't identify the person, but the video shows a man who walks along a beach.",
        "I cannot see any text. The video shows a red ball that rolls over a green table to the left.",
        "I'm sorry for the confusion. A man walks along a beach.",
        "As night falls, a boat turns left.",
        "As a model airplane lands, a child claps.",
        "The content of the box is blocked by a lid.",
        "No frames hang on the wall; a cat walks below it.",
        "Der Mann kann die Tür leider nicht öffnen.",
        "لا أحد في الشارع، وقطة تمشي على الرصيف.",
        "女性は質問にお答えできませんと言い、部屋を出る。",
        "How can a cat climb so high? It jumps from branch to branch.",
        "",
    ],
)
def test_a_description_is_no_refusal(text: str) -> None:
    assert refusal(text) is None


@pytest.mark.parametrize(
    ("answer", "meant"),
    [
        ("<THINK>Is it red?</THINK>A ball rolls.", "A ball rolls."),
        ("<reasoning>Is it red?\n</reasoning>\nA ball rolls.", "A ball rolls."),
        ("<|channel|>analysis<|message|>Red.<|end|><|channel|>final<|message|>A ball rolls.", "A ball rolls."),
        ("Of course, I'd be happy to help. Based on the frames provided, a ball rolls.", "A ball rolls."),
        ("A ball rolls.\n\nNote: As an AI, I can only see frames.", "A ball rolls."),
        ("¡Claro! Aquí tienes una descripción:\n\nRueda una pelota.\n\n¿Necesitas algo más?", "Rueda una pelota."),
        ("Certainly! I'd be happy to help. Please let me know what you need.", ""),
        ('{"scene": "A ball rolls.", "mood": "It is \\"calm', "A ball rolls."),  # cut off by the longest answer
        ("assistant\nA ball rolls.", "A ball rolls."),
        ("[/INST] A ball rolls.", "A ball rolls."),
        ("Caption: A ball rolls.", "A ball rolls."),
        ("**Video description:** A ball rolls.", "A ball rolls."),
        ("Thought: I see a ball.\nFinal answer: A ball rolls.", "A ball rolls."),
        ('<tool_call>{"name": "zoom"}</tool_call>A ball rolls.', "A ball rolls."),
        ("\\boxed{A ball rolls.}", "A ball rolls."),
        ("The answer: a ball rolls.", "The answer: a ball rolls."),
        ("Prompt: A ball rolls.", "A ball rolls."),
        ("视频描述：球在滚动。", "球在滚动。"),
        ("Описание видео: мяч катится.", "Мяч катится."),
        ("> A ball rolls.\n> It stops.", "A ball rolls. It stops."),
        ("> - A ball rolls", "A ball rolls."),
        ("[b]A ball[/b] rolls[1]. It stops.[2]", "A ball rolls. It stops."),
        ("A ball rolls.\\nIt stops.\\n", "A ball rolls. It stops."),
        (
            "A ball &amp; a cube roll &mdash; slowly; 3 &lt; 4 &nosuchthing; &lt;b&gt;now&lt;/b&gt;.",
            "A ball & a cube roll — slowly; 3 < 4 &nosuchthing; now.",
        ),
        ("A ball <lora:ball_v2:0.8> rolls.", "A ball rolls."),
        ('[{"frame": 1, "text": "A ball rolls."}, {"frame": 2, "text": "It stops."}]', "A ball rolls. It stops."),
        ("{'scene': 'A ball rolls.', 'sure': True, 'more': [\"It's red.\"]}", "A ball rolls. sure True. It's red."),
        ("{a ball, a cube} roll", "{a ball, a cube} roll"),
        ("![frame 1](a.png) A ball \x1b[31mrolls\x1b[0m.", "A ball rolls."),
    ],
)
def test_what_is_around_an_answer_goes(answer: str, meant: str) -> None:
    assert clean_caption(answer) == meant


def test_a_model_that_counts_on_and_on_is_cut() -> None:
    text = "A ball rolls. " + " ".join(f"Then it passes post {number}." for number in range(1, 90)) + " It stops."
    assert clean_caption(text) == (
        "A ball rolls. Then it passes post 1. Then it passes post 2. Then it passes post 3. It stops."
    )


def test_a_list_that_counts_is_none() -> None:
    text = " ".join(f"Lamp {number} hangs over table {number + 3}." for number in range(1, 9))
    assert clean_caption(text) == text
    assert clean_caption(f"{text} Lamp 9 hangs over table 12. A cat sleeps.") == (
        "Lamp 1 hangs over table 4. Lamp 2 hangs over table 5. Lamp 3 hangs over table 6. A cat sleeps."
    )


@pytest.mark.parametrize(
    ("words", "stay"),
    [
        ([f"{number}th" for number in range(4, 40)], 3),
        (["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"], 8),
        (list("ABCDEFGHIJKLMNOPQ"), 8),
        (["red", "blue", "green", "grey", "white", "black"], 6),
    ],
)
def test_so_is_one_that_goes_through_words(words: list[str], stay: int) -> None:
    lines = [f"A {word} balloon rises." for word in words]
    assert clean_caption(" ".join(lines)) == " ".join(lines[:stay])


def test_a_sentence_that_grows_comes_once() -> None:
    assert (
        clean_caption(" ".join(f"A {'very ' * count}big dog runs." for count in range(3, 12))) == "A very big dog runs."
    )


@pytest.mark.parametrize("caption", ["…", "... !!! --- ???", "。、", "<think>a", "¡¿?!"])
def test_a_caption_without_a_word_is_refused(caption: str) -> None:
    with pytest.raises(UserError, match="holds no usable text"):
        compose_prompt("continue video", caption, words)


def words(text: str) -> int:
    return len(text.split()) + 1  # and the final </s>


@pytest.mark.parametrize(
    ("limit", "prompt"),
    [
        (99, "Go left. Mr. Fox sits. He jumps!"),
        (8, "Go left. Mr. Fox sits. He jumps!"),
        (7, "Go left. Mr. Fox sits."),
        (6, "Go left. Mr. Fox sits."),
        (5, "Go left. Mr. Fox"),  # not one sentence fits
    ],
)
def test_prompt_is_the_users_text_and_whole_sentences(limit: int, prompt: str) -> None:
    assert compose_prompt("Go left.", "Mr. Fox sits. He jumps!", words, limit) == prompt
    assert words(prompt) <= limit or limit == 99


def test_chinese_is_cut_at_sentences_then_at_characters() -> None:
    assert compose_prompt("", "一只猫在跑。它跳了。", len, 9) == "一只猫在跑。"
    assert compose_prompt("", "一只猫在跑。它跳了。", len, 4) == "一只猫在"


def test_a_word_that_is_longer_than_all_room_is_cut(caplog: pytest.LogCaptureFixture) -> None:
    """Thai is written without blanks."""
    assert compose_prompt("ไป", "แมววิ่งไปทางขวา", len, 7) == "ไป แมวว"
    assert not caplog.text


def test_a_long_text_of_the_user_stays_whole_and_is_mentioned(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert compose_prompt("a b c d e", "A cat.", words, 3) == "a b c d e"
    assert "no room for the caption: it has 6 of 3 tokens" in caplog.text


def test_a_caption_with_nothing_in_it_stops_the_run() -> None:
    with pytest.raises(UserError, match="no usable text.*or give prompt"):
        compose_prompt("Go left.", "<think>hm", words)


def test_words_that_repeat_with_others_that_do_are_told_once() -> None:
    assert clean_caption("a b a a b a a b a b a b.") == "A b."
    assert clean_caption("the sun the sun the sun sets sets sets.") == "The sun sets."


def test_a_refusal_beside_a_description_of_eight_words_is_one() -> None:
    declined = "I'm sorry, but I can't name the person."
    assert refusal(f"{declined} A man walks along a grey beach.") is not None  # seven
    assert refusal(f"{declined} A man walks along a long grey beach.") is None
    assert refusal(f"{declined} A man walks. You asked for a long grey beach. Let me know if it helps.") is not None


def test_a_refusal_is_told_on_a_line_of_two_hundred_characters() -> None:
    assert shortened("x" * 200) == "x" * 200 and shortened("x" * 201) == "x" * 197 + "..."
    told = refusal("I'm sorry,\n\nI cannot help with " + "that " * 60)
    assert (
        told is not None and len(told) == 200 and told.startswith("I'm sorry, I cannot help") and told.endswith("...")
    )


@pytest.mark.parametrize(
    ("text", "short"),
    [
        ("a" * 8001, "a" * 8000),
        ("wait" + "." * 9, "wait..."),
        ("wait" + "!?" * 9, "wait!?!"),
        ("wait..", "wait.."),
        ("-" * 41, "-" * 40),
        ("-" * 40, "-" * 40),
        ("a \t  b\n \n\n c", "a b\n c"),
    ],
)
def test_runs_of_one_kind_are_shortened(text: str, short: str) -> None:
    assert bounded(text) == short


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("Mr. Fox sits. He jumps!", ["Mr. Fox sits.", "He jumps!"]),
        ('He says "go." She goes.', ['He says "go."', "She goes."]),
        ("It costs 3.5 dollars e.g. here. Then", ["It costs 3.5 dollars e.g. here.", "Then"]),
        ("一只猫。它在跑！", ["一只猫。", "它在跑！"]),
    ],
)
def test_sentences_end_where_one_does(text: str, parts: list[str]) -> None:
    assert sentences(text) == parts


@pytest.mark.parametrize(
    ("answer", "clean"),
    [
        ('{"a": "He says \\"go\\"", "b": "It is 5 (five)", "c": "Then, "}', 'He says "go". It is 5 (five).'),
        ('{"a": null, "wheels": [3, 4], "sure": true}', "wheels 3. wheels 4. sure True."),
        ('["A dog runs"', "A dog runs"),
        ('{"a": "A dog\nruns.", "b": "It\tsits"}', "A dog runs. It sits."),
        ('{"a": "A dog runs", "b": "It sits. It slee', "A dog runs. It sits."),
        ('{"a": 1', '{"a": 1'),
        ("{}", ""),
        ('["A dog", ["runs", {"b": "fast"}]]', "A dog. runs. fast."),
    ],
)
def test_of_json_each_text_is_a_sentence(answer: str, clean: str) -> None:
    assert clean_caption(answer) == clean


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("# A scene (by night)\nA cat sits.", "A scene (by night). A cat sits."),
        ("- A cat, sitting,\n- A dog", "A cat, sitting, A dog."),
        ('> "Go"\n\n- "Stop"', '"Go" "Stop".'),
        ("A cat in frame 3. And a dog.", "A cat. And a dog."),
        ("Look: frame 2 shows a cat.", "Look: A cat."),
        (
            "A family \U0001f468\u200d\U0001f469\u200d\U0001f467 walks.",
            "A family \U0001f468\u200d\U0001f469\u200d\U0001f467 walks.",
        ),
        ("A\ufeff cat\ue000 sits.", "A cat sits."),
        ("One\vtwo\fthree.", "One two three."),
        ("A whole one.  . And two .", "A whole one. And two."),
        ("It stops", "It stops"),
        ("It stops. Then it", "It stops."),
        ("It stops. It stops. Then it goes", "It stops."),
    ],
)
def test_a_caption_keeps_its_words_as_sentences(raw: str, clean: str) -> None:
    assert clean_caption(raw) == clean


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("he runs and runs. Then he sits.", "he runs and runs. Then he sits."),  # twice is none
        ("go go go now.", "Go now."),
        ("now go go go.", "now go."),
        ("a b c a b c a b c.", "A b c."),
        ("He says: no no no, and yes yes yes yes.", "He says: no, and yes."),
        (
            " ".join(["one two three four five six seven eight nine ten"] * 3 + ["end."]),
            "One two three four five six seven eight nine ten end.",
        ),
    ],
)
def test_words_three_times_in_a_row_are_said_once(raw: str, clean: str) -> None:
    assert clean_caption(raw) == clean


def test_a_loop_may_have_thirty_words() -> None:
    def looped(count: int) -> str:
        return " ".join(["".join(chr(97 + int(digit)) for digit in str(number + 100)) for number in range(count)] * 3)

    assert len(clean_caption(f"x {looped(30)}.").split()) == 31
    assert len(clean_caption(f"x {looped(31)}.").split()) == 94


def test_sentences_that_differ_in_a_word_are_alike_from_three_words_on() -> None:
    names = ["Ada", "Bo", "Cy", "Di", "Ed", "Flo", "Gus", "Hal", "Ida", "Jo", "Kit", "Lu"]
    short = " ".join(f"{name} runs." for name in names)
    assert clean_caption(short) == short
    long = [f"{name} runs away." for name in names]
    assert clean_caption(" ".join(long)) == " ".join(long[:8])
    assert clean_caption(" ".join(long[:8])) == " ".join(long[:8])
    for count, stay in ((28, 8), (29, 12)):  # of more than thirty words no list is made
        words_ = " ".join("".join(chr(97 + int(digit)) for digit in str(number + 100)) for number in range(count))
        assert clean_caption(" ".join(f"{name} runs {words_}." for name in names)).count("runs") == stay


def test_a_prompt_has_512_tokens_and_an_emoji_says_something() -> None:
    sentence = "A cat sits on a mat. "
    text = " ".join(f"Cat {a}{b} sits on mat {b}{a}." for a in "abcdefghij" for b in "klmnopqrst")
    assert len(compose_prompt("", text, words).split()) == 510  # 85 sentences of six words, and the final </s>
    assert compose_prompt("", "\U0001f388\U0001f388", len, 9) == "\U0001f388\U0001f388"
    assert compose_prompt("  Go. ", f" {sentence}", words) == "Go. A cat sits on a mat."
