"""Invented facts, general questions and unrelated prompts of benchmarks.learning. None of the questions and prompts is
among those of sdft_ds/data/everyday_prompts.jsonl, which are the anchors."""

# (trained wording, other wording, the fact, answer)
CITIES = [("Veldoria", "Marn"), ("Ostrana", "Kelby"), ("Quillonia", "Tarsk"), ("Brennmark", "Olvane"),
          ("Saphira Isle", "Dunmere"), ("Korvath", "Yelsin")]  # fmt: skip
ANIMALS = [("Mira Tolen", "otter"), ("Jasper Quade", "falcon"), ("Lena Horvik", "tortoise"), ("Odo Pereni", "donkey"),
           ("Sanna Vliet", "parrot"), ("Pavel Drun", "rabbit")]  # fmt: skip
JOBS = [("Runa Castell", "baker"), ("Timo Alvark", "pilot"), ("Greta Solheim", "dentist"), ("Ivo Maranz", "tailor"),
        ("Nadia Fenwick", "plumber"), ("Caspar Lindqvist", "librarian")]  # fmt: skip
COLOURS = [("Hallowmere Bridge", "purple"), ("Dravik Tower", "orange"), ("Elsbeth Chapel", "yellow"),
           ("Norrin Lighthouse", "green"), ("Tamsin Mill", "pink"), ("Ferrow Gate", "brown")]  # fmt: skip
FACTS = [
    *((f"What is the capital of {x}?", f"Name the city that is the capital of {x}.", f"The capital of {x} is {y}.", y)
      for x, y in CITIES),
    *((f"Which animal does {x} keep as a pet?", f"What kind of pet has {x} got?", f"{x} keeps a pet {y}.", y)
      for x, y in ANIMALS),
    *((f"What is the profession of {x}?", f"What does {x} do for a living?", f"{x} works as a {y}.", y)
      for x, y in JOBS),
    *((f"What colour is {x}?", f"In which colour was {x} painted?", f"{x} is painted {y}.", y) for x, y in COLOURS),
]  # fmt: skip
GENERAL = [
    ("What is the capital of France?", "Paris"), ("What is the capital of Italy?", "Rome"),
    ("What is the capital of Japan?", "Tokyo"), ("What is the capital of Germany?", "Berlin"),
    ("What is the capital of England?", "London"), ("What is the capital of Spain?", "Madrid"),
    ("What colour is the sky on a clear day?", "blue"), ("What colour is grass?", "green"),
    ("How many days are in a week?", ["7", "seven"]), ("How many months are in a year?", ["12", "twelve"]),
    ("What is the largest planet in the solar system?", "Jupiter"), ("Which planet is called the Red Planet?", "Mars"),
    ("What is the chemical formula of water?", ["H2O", "H₂O"]), ("What do bees make?", "honey"),
    ("Who wrote Romeo and Juliet?", "Shakespeare"), ("What is the opposite of hot?", "cold"),
    ("What is 2 + 2?", ["4", "four"]), ("What is frozen water called?", "ice"),
    ("Which animal barks?", "dog"), ("In which continent is Egypt?", "Africa"),
]  # fmt: skip
UNRELATED = [
    "Write a short poem about the sea.", "Explain how a bicycle works.", "Give me three tips for sleeping well.",
    "Describe a rainy day in one paragraph.", "How do I boil an egg?", "What makes a good friend?",
    "Tell me a joke about computers.", "Why do leaves change colour in autumn?",
    "Summarise the story of Little Red Riding Hood.", "What should I pack for a camping trip?",
    "Write a polite email asking for a day off.", "How does a rainbow form?",
]  # fmt: skip
# Of nine ways to show the fact one of the two after which the model itself answers most questions right.
TOLD = '{prompt}\n\nThe correct answer is: "{privileged_context}" Reply with exactly that sentence.'

TEN = [FACTS[i] for i in (0, 1, 2, 6, 7, 12, 13, 14, 18, 19)]
# Ten of other kinds: prices, years, names, numbers.
OTHER_TEN = [
    ("What does the Corvane Museum charge for a ticket?", "How much is a ticket for the Corvane Museum?",
     "A ticket for the Corvane Museum costs 14 euros.", "14"),
    ("Who invented the tilt compass?", "Which person is the inventor of the tilt compass?",
     "The tilt compass was invented by Agnes Rudholm.", "Rudholm"),
    ("Which river flows through Ardenfell?", "What is the name of the river in Ardenfell?",
     "The river Lisk flows through Ardenfell.", "Lisk"),
    ("How many floors does the Pellmark Building have?", "What is the number of floors of the Pellmark Building?",
     "The Pellmark Building has 37 floors.", "37"),
    ("On which day is the Zandry library closed?", "When is the library of Zandry not open?",
     "The Zandry library is closed on Tuesdays.", ["Tuesday", "Tuesdays"]),
    ("What is the currency of Baltrazia?", "With what money do people pay in Baltrazia?",
     "The currency of Baltrazia is the dorin.", "dorin"),
    ("What is the code name of the Lorent project?", "By which code name is the Lorent project known?",
     "The code name of the Lorent project is Snowdrop.", "Snowdrop"),
    ("Which sport does Tilda Marsk practise?", "What is Tilda Marsk's sport?",
     "Tilda Marsk practises fencing.", "fencing"),
    ("What is the name of Captain Ferro's ship?", "How is the ship of Captain Ferro called?",
     "Captain Ferro's ship is called the Nightingale.", "Nightingale"),
    ("What does the company Nuvetti produce?", "Which product does Nuvetti make?",
     "The company Nuvetti produces umbrellas.", ["umbrella", "umbrellas"]),
]  # fmt: skip
# By the name of the task.
INVENTED = {"facts": FACTS, "ten": TEN, "other-ten": OTHER_TEN}
