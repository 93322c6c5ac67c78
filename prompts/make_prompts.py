"""Make train.txt and eval.txt: captions of our own, short and long mixed, none in GenEval's form.

    python prompts/make_prompts.py
"""
import argparse
import random
from pathlib import Path


def phrases(text: str) -> list[str]:
    """Split a text at its bars."""
    return [" ".join(phrase.split()) for phrase in text.split("|")]


SUBJECTS = phrases("""
an old fisherman | a young violinist | two children | a red fox | a grey heron |
a sleeping cat | a shepherd dog | a herd of goats | a flock of starlings | a snow leopard |
a baker | a street musician | a lighthouse keeper | a girl with a yellow umbrella |
three cyclists | a tram driver | a potter at her wheel | a steam locomotive |
a wooden sailing boat | a vintage bicycle | a rusty pickup truck | a hot-air balloon |
a stone bridge | a windmill | a small chapel | a glass greenhouse | a market stall |
a bowl of ripe cherries | a loaf of rye bread | a copper kettle | a chessboard | a grand piano |
a stack of old books | a paper lantern | a pocket watch | a blue teapot |
a vase of dried flowers | a knitted scarf | a beekeeper | a mountain guide | a ballet dancer |
an astronaut | a robot gardener | a dragon made of paper | a clockwork owl | a friendly ghost |
a giant tortoise | a pair of swans | a hedgehog | a barn owl | a jellyfish | a humpback whale |
an octopus | a row of beach huts | a ferris wheel | a cable car | a mossy waterfall |
a field of poppies | a lone oak tree | an apple orchard | a winding staircase | a carousel horse
""")

DOING = phrases("""
resting | waiting | looking up | lit from one side | half hidden | seen from above |
seen from far away | in the foreground | turned away | covered in dew |
reflected in still water | surrounded by birds | caught mid-motion | casting a long shadow |
framed by leaves | under a string of lights | wrapped in fog | dusted with snow |
glowing softly | tilted to one side
""")

PLACES = phrases("""
by a quiet harbour | on a windy cliff | in a narrow alley | at the edge of a pine forest |
in a sunlit kitchen | on a cobbled square | beside a frozen lake | in an empty train station |
on a rooftop at night | in a crowded bazaar | under an iron bridge | in a tall library |
on a salt flat | in a terraced vineyard | behind a rain-streaked window | in a dusty attic |
along a canal | in a bamboo grove | on the deck of a ferry | in a flooded meadow |
inside a greenhouse | at a village fair | on a mountain pass | in a cave full of crystals |
in a desert of orange dunes | near a coral reef | in a snowbound valley |
at an abandoned petrol station
""")

WHEN = phrases("""
at dawn | in the late afternoon | at blue hour | on a foggy morning | during a thunderstorm |
in early spring | in midwinter | under a full moon | at golden hour | in light rain |
on a bright summer day | just after sunset | on a windless night
""")

STYLES = phrases("""
oil painting | watercolour | charcoal sketch | woodcut print | pixel art | claymation still |
children's book illustration | black and white film still | 35mm street photography |
isometric rendering | stained glass | linocut | gouache on paper | low-poly model | ink wash |
vintage travel poster | embroidery | macro photograph | long exposure | paper collage |
pastel drawing | concept art | ukiyo-e print | botanical plate | fresco | comic panel
""")

DETAILS = phrases("""
muted colours | a shallow depth of field | strong contrast between light and shade |
visible brush strokes | a limited palette of teal and rust | soft rim light |
wide empty space on the left | fine grain | reflections everywhere | crisp morning air |
a low horizon | warm lamplight spilling out | a hint of motion blur | intricate texture |
a calm and slightly melancholic mood | a playful mood | deep perspective | symmetry |
smoke drifting upwards | petals scattered on the ground
""")
MOODS = ["quiet", "lively", "strange", "cosy", "vast"]


def caption(rng: random.Random) -> str:
    """Make one caption, of one of nine forms."""
    subject, doing, place, when, style = (
        rng.choice(words) for words in (SUBJECTS, DOING, PLACES, WHEN, STYLES))
    other = rng.choice([s for s in SUBJECTS if s != subject])
    one, two, three = rng.sample(DETAILS, 3)
    mood = rng.choice(MOODS)
    return rng.choice([
        f"{subject} {place}",
        f"{subject}, {style}",
        f"{subject} {when}",
        f"{style} of {subject} {place}",
        f"{subject} and {other} {place}, {style}",
        f"{subject}, {doing}, {place} {when}",
        f"{style} of {subject}, {doing}, {place}, {one}",
        f"{subject} {place} {when}, {doing}; in the background {other}. {style}, {one} and {two}",
        f"A {mood} scene {place} {when}: {subject}, {doing}, with {other} nearby. "
        f"The picture is done as {style}, with {one}, {two} and {three}.",
    ])


def captions(n: int, seed: int) -> list[str]:
    """Make n different captions."""
    rng = random.Random(seed)
    seen = {}
    while len(seen) < n:
        seen[caption(rng)] = None
    return list(seen)


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder of the files")
    args = p.parse_args()
    texts = captions(5012, 0)
    (args.out / "train.txt").write_text("\n".join(texts[:5000]) + "\n")
    (args.out / "eval.txt").write_text("\n".join(texts[5000:]) + "\n")


if __name__ == "__main__":
    main()
