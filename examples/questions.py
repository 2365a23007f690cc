"""Questions of the demo and of the benchmarks of real pairs, by kind."""

CHAT, CODE, EDITING = "chat", "code", "editing"
TEXT = (
    "The old lighthouse stands on the northern tip of the island. It was built in 1874 by the engineer Thomas Reed, "
    "and its lamp could be seen from thirty kilometres away. The keeper, Anna Moss, lived there with her two sons and "
    "a grey cat. Every evening she climbed the hundred and twelve steps to light the lamp. In the winter of 1921 a "
    "storm broke the glass of the lamp room, and the sons carried new panes up the stairs by hand."
)
PROGRAM = (
    "def read_table(path):\n    rows = []\n    with open(path) as file:\n        for line in file:\n"
    "            fields = line.strip().split(',')\n            if len(fields) == 3:\n"
    "                rows.append({'name': fields[0], 'city': fields[1], 'age': int(fields[2])})\n    return rows\n"
)
QUESTIONS = {
    CHAT: (
        "Explain to a ten-year-old why the sky is blue.",
        "Write an e-mail to my landlord: the heating has been broken since Monday.",
        "What is the difference between weather and climate?",
    ),
    CODE: (
        "Write a Python class for a stack with push, pop and peek.",
        "Write a Python function that returns the words of a text file with their counts, most frequent first.",
        "Write an SQL table for books and authors, and a query for the five authors with the most books.",
    ),
    EDITING: (
        f"Copy this text, but write 'tower' in place of 'lighthouse'.\n\n{TEXT}",
        f"Add type hints to this code and change nothing else.\n\n{PROGRAM}",
        f"List the sentences of this text, one on each line, with a number before each.\n\n{TEXT}",
    ),
}
