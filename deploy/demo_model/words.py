"""The closed word lists of the demo model's world.

Why closed: a model of a few million parameters can know a few hundred words well; every word it is asked about stands
here, so that a checker can tell a right answer from a wrong one by looking for the listed words in the text."""

# ruff: noqa: SIM905 (lists of words are read more easily as text)

from __future__ import annotations

NAMES = tuple(
    "Anna Ben Carla David Emma Felix Grace Henry Ines Jack Karim Lena Maria Noah Olga Peter Quinn Rosa Sam Tom Uma "
    "Victor Wei Xenia Yusuf Zoe Alice Bob Clara Daniel".split()
)
CHINESE_NAMES = ("小明", "小红", "小华", "小丽", "小军", "小芳", "小刚", "小燕")
COLOURS = tuple("red green blue yellow orange purple black white pink brown grey silver".split())
CHINESE_COLOURS = ("红色", "绿色", "蓝色", "黄色", "黑色", "白色")
CITIES = tuple(
    "Paris London Berlin Madrid Rome Vienna Oslo Prague Cairo Tokyo Beijing Shanghai Lisbon Dublin Athens Delhi".split()
)
PETS = tuple("cat dog rabbit horse parrot turtle hamster goat duck snake".split())
FOODS = tuple("pizza soup rice pasta salad bread cheese noodles curry cake".split())
OBJECTS = tuple(
    "apples pears books coins stamps marbles pencils stickers shells cards eggs oranges balloons tickets "
    "candles".split()
)
ITEMS = tuple(
    "apple banana cherry grape lemon mango melon orange peach pear plum kiwi bear camel deer eagle fox goat horse lion "
    "monkey otter panda rabbit shark tiger wolf zebra".split()
)
SPELLING = (
    *ITEMS,
    *tuple(
        "strawberry raspberry blueberry tomato potato cucumber pepper onion carrot pumpkin mississippi banana "
        "committee balloon coffee cheese butter bottle letter paper pencil window garden summer winter autumn "
        "spring river ocean mountain valley island forest flower morning evening kitchen bedroom school "
        "teacher student doctor engineer computer keyboard network server cluster expert mesh router gateway "
        "memory kernel tensor number calendar yellow purple green letter success address parallel bookkeeper "
        "assistant hello world".split()
    ),
)
WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
CHINESE_WEEKDAYS = ("星期一", "星期二", "星期三", "星期四", "星期五", "星期六", "星期日")
MONTHS = tuple("January February March April May June July August September October November December".split())
MONTH_DAYS = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)  # a year that is no leap year
UNITS = (
    (7, "days", "week"), (12, "months", "year"), (24, "hours", "day"), (60, "minutes", "hour"), (60,
    "seconds", "minute"),
    (365, "days", "year"), (52, "weeks", "year"), (100, "centimetres", "metre"), (1000, "metres", "kilometre"),
    (12, "eggs", "dozen"),
)  # fmt: skip
SKIES = ("sunny", "cloudy", "rainy", "snowy", "windy", "foggy")
