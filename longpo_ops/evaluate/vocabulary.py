"""Plain English words to make keys and lists of: `quiet-harbour` as a key, `harbour` in a list of words.

RULER takes its words from a package of some thousand nouns, adjectives and verbs. A key here is drawn from 200 thousand
pairs and not from 6 million. The list (vocabulary.txt) is about as long as RULER's: 8,775 words of at most 10 letters.
None of them is part of another, so an answer contains a word only where it says it.

Tests: tests/evaluate/test_needles.py.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from random import Random

_ADJECTIVES = """
able absent active actual aged agile alert alien alike alive ample ancient angry annual apt arid ashen awake aware
awkward bare basic bitter blank bland blind blunt bold brave brief bright brisk broad broken busy calm candid
careful careless casual cautious central certain charming cheap cheerful chilly chosen civic classic clean clear
clever clumsy coarse cold common complex concrete constant content cool correct costly cosy crisp crooked crude
cruel curious curly current damp daring dark dear decent deep delicate dense distant double doubtful dreamy dry
dual dull dusty eager early earnest easy elastic elder elegant empty endless entire equal even exact extra faint
fair faithful familiar famous fancy fatal feeble fertile festive few fierce final fine firm fit flat fluent fluid
foggy fond foreign formal fragile frail frank free frequent fresh friendly frosty frozen full funny future gentle
genuine giant glad gloomy golden graceful gradual grand grateful grave great greedy grim gritty guilty happy hard
harsh hasty hazy healthy heavy helpful hidden hollow holy honest hopeful hostile huge humble hungry icy ideal idle
ill immense inner innocent intact jolly joyful just keen kind large late lavish lazy lean legal lengthy light
likely little lively local lonely long loose loud loyal lucky lush mature meek mellow mental merry mighty mild
minor misty mobile modern modest moist moral muddy mute mutual naive narrow native neat nervous neutral new nimble
noble noisy normal notable numb obvious odd open orderly ordinary outer oval pale partial patient peaceful perfect
placid plain pleasant plump polite poor popular precious prim prime private prompt proper proud public pure quaint
quick quiet rapid rare raw ready real recent regal regular remote rich rigid ripe robust rough round royal rural
rusty sacred sad safe salty scarce secret secure senior serene serious severe shabby shallow sharp shiny short shy
silent silky silly similar simple sincere single sleepy slender slim slow small smart smooth sober social soft
solar solemn solid sour spare sparse special spicy stable stale stark steady steep stern stiff still stout strange
strict strong sturdy subtle sudden sunny superb supreme sweet swift tall tame tart tasty tender tense thick thin
thirsty thorough tidy tight tiny tired total tough tranquil tricky true typical unique unusual upper upright urban
urgent useful usual vague vain valid varied vast vital vivid warm wary wavy weak wealthy weary weekly wide wild
willing windy wise witty wooden worthy young zealous
"""
_NOUNS = """
acorn actor album alley anchor ankle answer apple apron arch arrow artist atlas autumn badge bakery balcony ball
bamboo banana banner barber barley barn barrel basin basket beach beacon bean beard bedroom bell belt bench berry
bicycle birch biscuit blanket blossom boat bonnet book boot bottle bowl box bracelet branch brass bread breeze
brick bridge broom brother brush bucket buckle bundle butter button cabin cable cactus cake camera canal candle
canoe canvas cape captain caravan cargo carpet carrot castle cave cedar ceiling cellar chain chair chalk chapel
chapter cheese cherry chest chimney church circle circus citizen city clay cliff clock cloth cloud clover coach
coal coast cobbler coffee coin collar comet compass copper coral cork corner cottage cotton cousin cradle crane
crayon cream creek crown crystal cupboard curtain cushion dairy daisy dancer daughter dawn decade desert desk
diamond diary dinner doctor dome donkey door dragon drawer dream dress drum eagle earring easel echo elbow ember
engine envelope evening fabric factory falcon farmer feather fence ferry fiddle field finger flag flame flask
flower flute forest forge fork fountain fox frame friend fruit funnel galaxy gallery garage garden garlic gate
glacier glass glove goat gondola granite grape gravel guitar hammer hammock handle harbour harvest hat hazel hedge
helmet herb hill hinge honey hood horizon horn horse hotel hour house iceberg inn insect island ivory jacket jar
jelly jewel journal journey jug juice jungle kettle keyhole kiosk kitchen kite knight ladder lagoon lake lamp
lantern lawn leaf leather lemon lentil letter library lily linen lion lizard lobby locket lodge loom lumber machine
magnet mango mantle map maple marble market mask meadow medal melody melon merchant metal meteor mill mineral
mirror mitten monastery monkey month moon morning mosaic moss mountain mouse museum mushroom music mustard napkin
necklace needle nephew nest nickel notebook nutmeg oak oasis ocean office olive onion orange orbit orchard orchid
organ otter oven oyster paddle painter palace palm pancake panel paper parade parcel park parrot pasture path
pebble pencil pepper piano picture pigeon pillow pilot pine pipe pirate planet plate plaza plum pocket poem poet
pond porch portrait potato powder prairie prince puddle pumpkin puppet puzzle pyramid quarry quartz quill quilt
rabbit raft railway rain ranch raven recipe reef ribbon ridge ring river road robin rocket roof room rope rose
ruler saddle sail salad salmon sand sandal satchel saucer scarf school scissors season shadow shell shepherd ship
shirt shoulder shovel signal silver singer sister sketch skirt sleeve slipper smoke snow soap soldier song soup
sparrow spear spider spoon spring square squirrel stadium stair star statue steam stone storm story stove
stream street student suitcase summer sunset sweater swing sword table tailor tavern teacher teapot temple tent
theatre thimble thread throne thunder ticket tiger timber toast tomato torch tower town track traffic trail train
tree trench trumpet tulip tunnel turnip turtle umbrella uncle valley vase velvet village vine violin volcano wagon
walnut water waterfall wave weather wheat wheel whistle widow willow window winter wizard wolf wool workshop yard
yarn year zebra zipper
"""
ADJECTIVES, NOUNS = tuple(_ADJECTIVES.split()), tuple(_NOUNS.split())


@cache
def words() -> tuple[str, ...]:
    """The words of lists, in alphabetical order."""
    return tuple(Path(__file__).with_suffix(".txt").read_text(encoding="ascii").split())


def draw_keys(random: Random, count: int) -> list[str]:
    """Different adjective-noun pairs; the first are the same for any count. Raises ValueError for more than there are."""
    if count > len(ADJECTIVES) * len(NOUNS):
        raise ValueError(
            f"a sample of this length needs {count} different words, and there are {len(ADJECTIVES) * len(NOUNS)} pairs "
            "of an adjective and a noun"
        )
    numbers = draw(random, len(ADJECTIVES) * len(NOUNS), count)
    return [f"{ADJECTIVES[i // len(NOUNS)]}-{NOUNS[i % len(NOUNS)]}" for i in numbers]


def draw(random: Random, size: int, count: int) -> list[int]:
    """`count` different numbers below `size`, which is at least as many; the first are the same for any count."""
    numbers: dict[int, None] = {}
    while len(numbers) < count:
        numbers[random.randrange(size)] = None
    return list(numbers)
