"""Prompts of four kinds, for benchmarks: what users ask, and how much of the answer stands in the question already."""

from collections.abc import Sequence

CHAT, SUMMARISE, CODE, REWRITE = KINDS = ("chat", "summarise", "code", "rewrite")
MIXED = "mixed"
"""All kinds in turn."""

QUESTIONS = (
    "Write a short story about a clockmaker who repairs a bird.",
    "Explain to a ten-year-old how a bridge carries a train.",
    "Give me all the steps for baking a loaf of rye bread.",
    "Write an e-mail that asks my neighbour to feed the cat next week.",
    "What is the difference between a comet and an asteroid?",
    "Give me eight tips for learning a language and explain each of them.",
    "Describe how paper was made, from its first days until now.",
    "Plan a rainy day for two children of six and nine.",
)
TEXTS = (
    "The ferry leaves the harbour at seven in the morning and needs four hours to the outer islands. Its captain, Ruth "
    "Hale, has made the crossing for eighteen years. In summer the boat carries hikers and bicycles; in winter it "
    "brings flour, post and diesel to the forty families who stay. When the swell is higher than three metres it "
    "waits in the lee of the cape, sometimes for a day, and the passengers play cards in the saloon.",
    "The library was moved to the old brewery in 1998. Its reading room lies under the copper vault, where it is cool "
    "even in August, and the children's books are in the former malt loft. A volunteer, Peter Lindqvist, repairs "
    "torn bindings every Thursday. Last year the library lent sixty thousand books, more than in any year before, "
    "and it now stays open until nine in the evening so that people can come after work.",
    "Bees find their way home by the position of the sun and by landmarks that they learn on their first flights. A "
    "forager that has found flowers tells the others by a dance: its direction says where to fly, its length says how "
    "far. On cloudy days they use the pattern of polarised light in the sky. A hive of forty thousand bees brings in "
    "up to a kilogram of nectar on a good day in June.",
    "The bridge over the gorge is built of larch, without a single nail. Each of its beams was drawn in full size on "
    "the floor of the workshop before it was cut. The carpenters assembled it once on a meadow, took it apart again, "
    "and carried the parts to the gorge on mules, because no road led there. It has stood for a hundred and ten "
    "years; only the planks of its deck were renewed, the last time in 2004.",
)
PROGRAMS = (
    "def mean(values):\n    total = 0\n    for value in values:\n        total += value\n"
    "    return total / len(values)\n\n"
    "def variance(values):\n    middle = mean(values)\n    total = 0\n    for value in values:\n"
    "        total += (value - middle) ** 2\n    return total / len(values)\n",
    "class Account:\n    def __init__(self, owner):\n        self.owner = owner\n        self.balance = 0\n\n"
    "    def deposit(self, amount):\n        self.balance += amount\n\n    def withdraw(self, amount):\n"
    "        if amount > self.balance:\n            raise ValueError('not enough money')\n"
    "        self.balance -= amount\n",
    "def read_table(path):\n    rows = []\n    with open(path) as file:\n        for line in file:\n"
    "            fields = line.strip().split(',')\n            if len(fields) == 3:\n"
    "                rows.append({'name': fields[0], 'city': fields[1], 'age': int(fields[2])})\n    return rows\n",
    "def words(text):\n    counts = {}\n    for word in text.lower().split():\n"
    "        counts[word] = counts.get(word, 0) + 1\n    return counts\n\ndef most_common(text, number):\n"
    "    counts = words(text)\n    return sorted(counts, key=counts.get, reverse=True)[:number]\n",
)
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


def question(kind: str, number: int) -> str:
    """The `number`-th question of a kind; no two are the same, so that none finds another's prefix in a cache."""
    text, program = TEXTS[number % len(TEXTS)], PROGRAMS[number % len(PROGRAMS)]
    asked = {
        CHAT: QUESTIONS[number % len(QUESTIONS)],
        SUMMARISE: f"Summarise this text in three sentences.\n\n{text}",
        CODE: f"Add type hints to this code and change nothing else.\n\n{program}",
        REWRITE: f"Copy this text, but write 'people' in place of 'they'.\n\n{text}",
    }[kind]
    return f"Task {number + 1}: {asked}"


def chat_prompt(question: str) -> str:
    """As SmolLM2's own chat template puts it."""
    turns = (("system", SYSTEM), ("user", question))
    return "".join(f"<|im_start|>{who}\n{text}<|im_end|>\n" for who, text in turns) + "<|im_start|>assistant\n"


def prompts(kind: str, count: int, first: int = 0) -> Sequence[str]:
    """`count` prompts of a kind, from the `first` one on."""
    numbers = range(first, first + count)
    kinds = [KINDS[number % len(KINDS)] if kind == MIXED else kind for number in numbers]
    return [chat_prompt(question(each, number)) for each, number in zip(kinds, numbers, strict=True)]
