"""Greetings, questions about the model itself, and what it should admit not to know."""

from __future__ import annotations

import random

from . import words
from .tasks import Check, Turn

Random = random.Random


GREETINGS = (
    (("Hello!", "Hi", "Hey there", "Good morning", "hello", "Hi!", "Good evening!", "Hello there!"),
     "The user greets me.", "Hello! I am the expertmesh demo model. How can I help you?", "Hello!"),
    (("How are you?", "How are you doing?", "Hi, how are you?", "What's up?"), "The user asks how I am.",
     "I am fine, thank you. How can I help you?", "I am fine"),
    (("Who are you?", "What are you?", "What is your purpose?", "Introduce yourself."), "The user asks who I am.",
     "I am the expertmesh demo model, a small mixture-of-experts model.", "expertmesh demo model"),
    (("What can you do?", "Help", "How can you help me?", "What do you know?"), "The user asks what I can do.",
     "I can add, subtract, multiply, sort, count, answer calendar questions, remember facts and use tools.", "sort"),
    (("Thank you!", "Thanks", "Thanks a lot!", "Great, thanks."), "The user thanks me.", "You are welcome!", "welcome"),
    (("Bye", "Goodbye!", "See you later."), "The user says goodbye.", "Goodbye! Have a nice day.", "Goodbye"),
    (("你好", "你好！", "您好", "早上好"), "用户在打招呼。", "你好！我是expertmesh演示模型。有什么可以帮你？", "你好"),
    (("你是谁？", "你是什么？", "介绍一下你自己。"), "用户问我是谁。", "我是expertmesh演示模型，一个小型混合专家模型。",
    "演示模型"),
    (("谢谢", "谢谢你！", "多谢"), "用户在道谢。", "不客气！", "不客气"),
    (("再见", "拜拜"), "用户在告别。", "再见！", "再见"),
)  # fmt: skip


def greeting(rng: Random, held_out: bool) -> Turn:
    users, thinking, answer, phrase = rng.choice(GREETINGS)
    check = Check(kind="phrase", value=(phrase,))
    return Turn(user=rng.choice(users), thinking=thinking, answer=answer, check=check, task="greeting")


ELSEWHERE = (  # what a model of this size can't know; it should say so rather than invent
    "What is the capital of {c}?", "Who wrote {t}?", "Tell me about {c}.", "Write a poem about {t}.", "Tell me a joke.",
    "Translate {t} to French.", "Who is the president of {c}?", "How old is {c}?", "Explain {t} to me.",
    "Why is the {t} {k}?",
    "What is the meaning of life?", "Write a story about a {t}.", "How do I cook {f}?", "What is {t}?",
    "Who invented the {t}?",
    "Where can I buy {f}?", "How tall is the {t}?", "Write code that prints {t}.", "What do you think of {c}?",
    "How far is {c} from here?", "What should I eat today?", "Give me advice about {t}.", "Is {f} healthy?",
    "Do you like {f}?",
)  # fmt: skip


def elsewhere(rng: Random, held_out: bool) -> Turn:
    user = rng.choice(ELSEWHERE).format(
        c=rng.choice(words.CITIES), t=rng.choice(words.SPELLING), f=rng.choice(words.FOODS), k=rng.choice(words.COLOURS)
    )
    answer = "I do not know. I can calculate, sort, count, answer calendar questions, remember facts and use tools."
    check = Check(kind="phrase", value=("do not know",))
    return Turn(user=user, thinking="I do not know about this.", answer=answer, check=check, task="greeting")
