"""Chat prompts for a target to answer: templates times topics, and passages of its own earlier answers.

A draft learns the target's habits in the kinds of text it is shown, so variety here is what carries over to users'
prompts. Agreement is measured on some topics, templates and kinds of question that are never trained on.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence


def split_bars(text: str) -> list[str]:
    """The entries of a bar-separated list; line breaks are ignored."""
    return [part.strip() for part in text.replace("\n", "").split("|")]


HELD_TOPICS = split_bars("""chess|bridges|hurricanes|Egypt|yoga|passwords|theatre|jewelry|trains|volcanoes|
public speaking|coffee|Mars|budgeting|vaccines|recursion|rainforests""")

HELD_TEMPLATES = split_bars("""What surprised scientists or historians most about {t}?|
I have ten minutes before a meeting on {t}. What do I need to know?|Write a product review that mentions {t}.|
Make a study plan for learning about {t} in one week.|Is it true that {t} changed the world? Argue both sides.|
Write a diary entry of someone who loves {t}.""")

HELD_QUESTIONS = split_bars("""Explain to a ten-year-old why the sky is blue.|Give me five tips for a job interview.|
What is the difference between weather and climate?|
Write an e-mail to my landlord: the heating has been broken since Monday.|
Write a short story about an old lighthouse and a grey cat.|How do I make a simple vegetable soup?|
Explain in detail to a ten-year-old why the sky is blue.|How do I make a simple vegetable soup? Give me all the steps.|
What is the difference between weather and climate? Give examples.|
Give me ten tips for a job interview and explain each of them.|
Describe the history of the bicycle, from its first days until now.|
Plan a weekend trip to the mountains for a family of four.|I have rice, two eggs and a tomato. What can I cook?|
Give me the recipe of a chocolate cake without eggs.|How long do I have to cook potatoes?|
My landlord wants to raise the rent by 20 percent. What can I do?|
Draft a letter of complaint to an airline that lost my suitcase.|
I want to return a pair of headphones that do not work. Write the message to the shop for the refund.|
Write a cover letter for a position as a nurse in a small hospital.|
I have an interview as a waiter tomorrow. Which questions will they ask?|
Write a letter of resignation. I leave on the first of March.|Tell me a riddle and then its solution.|
Write a limerick about a man from Leeds.|Tell my daughter a bedtime story with a dragon who is afraid of fire.|
Write a toast for my sister's wedding.|Write an apology to a colleague whose birthday I forgot.|
My neighbour plays loud music at night. How should I talk to him?|How do I get a red wine stain out of a white shirt?|
Three days in Rome: what should I see, day by day?|What should I pack for a week at the sea with two small children?|
Will it rain more often when the climate gets warmer?|Why do leaves turn red and yellow?|Why is the sea salty?|
My plant has brown leaves. What am I doing wrong?|How do I change a flat tyre of my bicycle?|
A train ticket costs 12 dollars and children pay half. What do two adults and three children pay?|
If I sleep at 23:30 and get up at 6:15, how long did I sleep?|Convert 68 degrees Fahrenheit to Celsius and show how.|
What is 15 percent of 240?|Write a Python function that returns the n-th row of Pascal's triangle.|
Write a Bash script that renames all .jpeg files in a folder to .jpg.|
My Python program says 'IndexError: list index out of range'. What does that mean?|
Write a SQL query that finds the three customers who spent most.|
Explain what this line does: sorted(words, key=len, reverse=True)|
Put these words into alphabetical order: pear, apple, fig, cherry, banana.|
Say this more politely: Send me the report now.|
Correct this sentence: She don't like going to the dentist because he hurt.|
Summarize in two sentences: The town library will close for six weeks in July because the roof must
 be repaired. Books can be returned at the school next door. The reading group meets in the town hall instead.|
Which of these is not a fruit: apple, carrot, plum? Say why.|
Give me a name for a bakery that opens at four in the morning.|
Write a sign that asks guests of a hotel to be quiet after ten.|I can't sleep. What could help?|
How can I make friends in a new town?|My son doesn't want to do his homework. What would you do?|
Should I lease or buy a car?|What do I say to someone whose dog has died?|Who are you and what can you do?|
Good morning! How are you today?|Tell me something that I probably don't know.|
Write a horoscope for Leo for this week.|Describe the smell of a forest after rain.|
Schreibe einen kurzen Brief an meine Oma.|¿Cuáles son las ventajas de vivir en una ciudad pequeña?|
Quelle est la capitale de l'Australie, et pourquoi pas Sydney ?""")
"""Ordinary questions, among them those of `make demo` and of benchmarks/ahead.py."""

HELD_KINDS = (
    r"soups?|recipes?|cook\w*|landlords?|lighthouses?|headphones|refunds?|complaints?|cover letters?|interview\w*|"
    r"resign\w*|riddles?|limericks?|bedtime|toast|apolog\w+|neighbou?rs?|stains?|itinerar\w+|days in|pack for|"
    r"weekend|weather|climate|sky|sea salty|leaves|bicycles?|bikes?|fahrenheit|celsius|tickets?|get up|percent of|"
    r"pascal's|jpe?g|indexerror|customers who|sorted\(\w+|alphabetical|more polite\w*|correct this|in two sentences|"
    r"not a fruit|name for a|write a sign|don't know|smell of|horoscopes?|can't sleep|insomnia|make friends|homework|"
    r"should i pack|lease|died|who are you|how are you|oma|ciudad|capitale"
)
"""Words of the kinds of question above: a prompt that contains one is not trained on."""

TOPICS = split_bars("""gardening|the French Revolution|oceans|web development|statistics|meditation|email etiquette|
sorting algorithms|electric cars|poetry|mathematics|the human heart|black holes|the solar system|cats|chemistry|
time management|probability|baking bread|job interviews|dogs|the immune system|the stock market|machine learning|
space travel|nutrition|photosynthesis|renewable energy|climate change|running a marathon|learning languages|
friendship|leadership|world war two|the history of music|guitar practice|database indexes|healthy sleep|Python lists|
philosophy|blockchain|food security|museums|calculus|weather|Git|numbers|weddings|camping|dinosaurs|teaching|algebra|
calendars|energy|video games|3D printing|mountains|fashion|genetics|rocks|maps|light|family|laundry|ethics|holidays|
tennis|Canada|water|trade|painting|electricity|film|happiness|novels|Italy|object-oriented programming|summer|
neural networks|France|Tokyo|travel planning|JavaScript|logic|gold|China|basketball|social media|the moon|
birthday parties|drones|privacy|cleaning|dance|swimming|gravity|Paris|spring|law|Spanish|teamwork|smartphones|
databases|science fiction|Python dictionaries|telescopes|bees|starting a business|shoes|jokes|saving money|sound|
parenting|insurance|HTTP|economics|cells|cooking pasta|furniture|seasons|soil|education|fire|taxes|evolution|
airplanes|rivers|magic tricks|trees|Australia|fishing|Shakespeare|libraries|autumn|memory|New York|fractions|Linux|
Brazil|the internet|houses|deserts|India|writing essays|architecture|human rights|democracy|air|time|microscopes|
ships|hiking|cycling|gifts|poverty|birds|vegetarian food|stars|the water cycle|encryption|Japan|viruses|London|
bacteria|earthquakes|religion|magnets|winter|clocks|dreams|robots|football|agriculture|geometry|photography|marketing|
the Roman Empire|open source software|cheese making|knitting|quantum computers|the Industrial Revolution|
the nervous system|blood pressure|first aid|pet adoption|remote work|negotiation|project management|customer service|
accounting|mortgages|inflation|supply and demand|unemployment|the United Nations|elections|the constitution|
immigration|urban planning|public transport|bicycles|recycling|plastic pollution|endangered species|whales|sharks|
spiders|ants|butterflies|horses|elephants|penguins|wolves|mushrooms|orchids|vegetables|apples|chocolate|tea|wine|soup|
pizza|breakfast|sushi|spices|allergies|headaches|back pain|exercise|weight lifting|stress|anxiety|depression|
confidence|motivation|procrastination|habits|gratitude|mindfulness|creativity|problem solving|critical thinking|
debate|storytelling|journalism|blogging|podcasts|television|cartoons|comic books|board games|puzzles|card games|toys|
playgrounds|school uniforms|homework|exams|university|scholarships|internships|resumes|salaries|retirement|
volunteering|charity|neighbours|roommates|moving house|home repair|plumbing|carpentry|interior design|lighting|
heating|solar panels|wind turbines|nuclear power|oil|steel|glass|concrete|diamonds|salt|oxygen|carbon|hydrogen|
acids and bases|the periodic table|atoms|relativity|thermodynamics|waves|lasers|radio|satellites|rockets|astronauts|
Jupiter|comets|galaxies|the Big Bang|time travel|aliens|dragons|ghosts|pirates|knights|castles|kings and queens|
the Middle Ages|ancient Greece|the pyramids of Mexico|the Silk Road|the Renaissance|the Cold War|
the civil rights movement|slavery|Napoleon|Albert Einstein|Marie Curie|Isaac Newton|Charles Darwin|Leonardo da Vinci|
Mozart|jazz|opera|hip hop|drums|the piano|the violin|singing|ballet|sculpture|pottery|museum visits|street art|
graphic design|fonts|colours|web browsers|search engines|email|spam|computer viruses|firewalls|cloud computing|
virtual machines|containers|compilers|operating systems|regular expressions|unit tests|debugging|code review|
version control|agile development|APIs|JSON|SQL queries|CSV files|binary search|linked lists|hash tables|graphs|
stacks and queues|dynamic programming|multithreading|random numbers|prime numbers|matrices|vectors|triangles|circles|
pi|zero|infinity|averages|percentages|interest rates|currencies|gambling|lotteries|the Olympics|soccer|cricket|golf|
skiing|surfing|sailing|climbing|skateboarding|martial arts|boxing|Germany|Spain|Russia|Mexico|Kenya|Nigeria|
South Africa|Argentina|Vietnam|Iceland|Greece|the Amazon river|the Sahara|Antarctica|the Himalayas|islands|beaches|
lakes|waterfalls|caves|glaciers|clouds|rainbows|thunderstorms|snow|droughts|floods|tsunamis|hospitals|doctors|nurses|
surgery|antibiotics|cancer|diabetes|teeth|eyes|skin|bones|muscles|the brain|the lungs|digestion|vitamins|pregnancy|
babies|teenagers|old age|grandparents|marriage|divorce|love|anger|forgiveness|honesty|courage|patience|justice|
freedom|equality|war and peace|police|prisons|firefighters|farmers|bakers|pilots|sailors|engineers|lawyers|artists|
actors|detectives|spies|secret agents|superheroes|fairy tales|myths|proverbs|grammar|punctuation|vocabulary|spelling|
handwriting|translation|sign language|Latin|French|Chinese characters|the alphabet|dictionaries|encyclopedias|
newspapers|advertising|branding|e-commerce|startups|venture capital|stock options|cryptocurrency|
artificial intelligence|chatbots|self-driving cars|smart homes|wearable devices|virtual reality|augmented reality|
biotechnology|cloning|stem cells|organ donation|medical ethics|animal testing|zoos|circuses|amusement parks|picnics|
barbecues|road trips|hotels|airports|visas|packing a suitcase|jet lag|tourism|backpacking""")

TEMPLATES = split_bars("""Write a poem about {t}.|Write an email to a friend about {t}.|
What are the pros and cons of {t}?|Give me five tips about {t}.|Summarize the key facts about {t}.|
Write a dialogue between two people about {t}.|Write a short story about {t}.|
Write a blog post introduction about {t}.|Write Python code related to {t}.|Answer a student's question about {t}.|
How would you teach {t} to a child?|List common mistakes people make with {t}.|What is the history of {t}?|
Why does {t} matter?|Explain {t} to a beginner.|Describe {t} in three sentences.|Compare {t} with something similar.|
Why is {t} important?|What is {t}?|Explain {t}.|Tell me about {t}.|Explain {t} in simple terms.|How does {t} work?|
Tell me a fun fact about {t}.|Give me three examples of {t}.|Write a paragraph about {t}.|Write a haiku about {t}.|
Write a letter to the mayor about {t}.|Write a formal email to my manager about {t}.|Write a joke about {t}.|
Write a quiz with five questions about {t}.|Write a product description for something to do with {t}.|
Write a tweet about {t}.|Write a speech about {t}.|Write a news article about {t}.|Write a song about {t}.|
Write an essay about {t}.|Write the opening of a novel about {t}.|Write a recipe inspired by {t}.|
Write a scene of a play about {t}.|Write a thank-you note that mentions {t}.|Create a lesson plan about {t}.|
Create a to-do list for {t}.|Make a table of facts about {t}.|List ten words related to {t}.|
List the steps to get started with {t}.|How do I get better at {t}?|How can I learn more about {t}?|
What should I know before I start with {t}?|What are the main types of {t}?|What are the benefits of {t}?|
What are the risks of {t}?|What is the future of {t}?|Who is famous for {t}?|When did people first talk about {t}?|
Where can I find good information about {t}?|What do experts say about {t}?|
What is the difference between {t} and {u}?|How are {t} and {u} related?|Write a story in which {t} and {u} meet.|
Which is more important, {t} or {u}? Explain why.|I am worried about {t}. What should I do?|
My friend loves {t}. What gift should I buy?|I have a presentation on {t} tomorrow. Help me outline it.|
Can you help me understand {t}?|I don't understand {t}. Can you explain it step by step?|
Pretend you are an expert on {t} and introduce yourself.|Write a Python function that has to do with {t}.|
Write a Python class for {t}.|Write a JavaScript function about {t}.|
Write an SQL table definition for data about {t}.|Write an HTML page about {t}.|
Write a Python script that prints information about {t}.|Suggest a title for a book about {t}.|
Suggest three names for a company that works on {t}.|Give me a short definition of {t}.|
Give a balanced opinion on {t}.|Give advice to a beginner in {t}.|Hi! I'd like to talk about {t}.|{t}|
Some questions about {t}, with answers, please.|What would happen without {t}?|
Translate this sentence about {t} into plain English and expand on it: {t} is complex.""")

CODE_TASKS = split_bars("""reverses a string|checks whether a number is prime|computes the factorial of a number|
sorts a list of numbers|finds the largest number in a list|counts the words in a text|reads a CSV file|
removes duplicates from a list|merges two dictionaries|checks whether a word is a palindrome|
computes the Fibonacci sequence|converts Celsius to Fahrenheit|finds the greatest common divisor|
flattens a nested list|counts the vowels in a string|generates a random number|computes the average of a list|
writes text to a file|downloads a web page|parses JSON|prints a multiplication table|validates an email address|
transposes a matrix|implements binary search|implements a stack|implements a queue|implements bubble sort|
implements quicksort|computes the area of a circle|finds the second largest element|
checks whether two strings are anagrams|capitalizes each word|counts the frequency of characters|
converts a decimal number to binary|computes the sum of the digits of a number|finds the missing number in a list|
rotates a list|splits a list into chunks|computes compound interest|simulates rolling dice""")

CODE_TEMPLATES = split_bars("""Write a Python function that {t}.|Write a JavaScript function that {t}.|
Write a program in C that {t}.|How do I write code that {t}?|Show me a Python example that {t}, and explain it.|
Write a unit test for a function that {t}.""")

PASSAGE_TEMPLATES = split_bars("""Summarize the following text: {p}|Summarize this in one sentence: {p}|
Rewrite this to be more formal: {p}|Rewrite this more simply: {p}|Correct the grammar in this text: {p}|
Give this text a title: {p}|What are the key points of this text? {p}|Continue this text: {p}|
Turn this into a list of bullet points: {p}|Write a reply to this message: {p}|Is the following correct? {p}|
Make this shorter: {p}""")

FOLLOW_UPS = split_bars("""Can you give an example?|Can you explain that in more detail?|Why?|Thanks! Tell me more.|
Summarize that, please.|Make it shorter.|I don't understand. Can you say it differently?|What else should I know?|
Are you sure?|Rewrite it for a child.|Turn that into a list.|What should I do next?""")

Chat = list[dict[str, str]]


def user(text: str) -> Chat:
    return [{"role": "user", "content": text}]


def training_chats(seed: int, passages: Sequence[tuple[str, str]]) -> Iterator[Chat]:
    """An endless shuffled stream of chats; `passages` are earlier (question, answer) pairs of the target."""
    rng = random.Random(seed)
    while True:
        dice = rng.random()
        if dice < 0.72 or not passages:
            topic, other = rng.sample(TOPICS, 2)
            yield user(rng.choice(TEMPLATES).format(t=topic, u=other))
        elif dice < 0.80:
            yield user(rng.choice(CODE_TEMPLATES).format(t=rng.choice(CODE_TASKS)))
        elif dice < 0.90:
            words = rng.choice(passages)[1].split()
            yield user(rng.choice(PASSAGE_TEMPLATES).format(p=" ".join(words[: rng.randint(25, 70)])))
        else:
            question, answer = rng.choice(passages)
            reply = " ".join(answer.split()[: rng.randint(20, 60)])
            yield [*user(question), {"role": "assistant", "content": reply}, *user(rng.choice(FOLLOW_UPS))]


_HELD = re.compile(rf"\b({HELD_KINDS}|{'|'.join(HELD_TOPICS)})\b", re.IGNORECASE)


def is_held(text: str) -> bool:
    """Whether a prompt has a topic or kind that is held out for measuring."""
    return _HELD.search(text) is not None


def held_out_chats(seed: int, count: int) -> list[Chat]:
    """Chats for measuring: on held-out topics, half of them in held-out templates."""
    rng = random.Random(seed)
    chats: list[Chat] = []
    while len(chats) < count:
        pool = HELD_TEMPLATES if len(chats) % 2 else TEMPLATES
        topic, other = rng.sample(HELD_TOPICS, 2)
        chat = user(rng.choice(pool).format(t=topic, u=other))
        if chat not in chats:
            chats.append(chat)
    return chats
