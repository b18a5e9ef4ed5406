"""The words of the stories: who, what and where, chosen so that any of them go together."""

from __future__ import annotations


def listed(text: str) -> list[str]:
    """The words of a text."""
    return text.split()


# Few, since every name is one more that a small model must learn to hold on to. Nobody can be friends with a namesake.
HEROES = {
    **dict.fromkeys(listed("Mia Lily Anna Zoe Ruby Clara Lucy"), "she"),
    **dict.fromkeys(listed("Tom Ben Max Leo Sam Finn Jack"), "he"),
}
FRIENDS = {
    **dict.fromkeys(listed("Ivy Hazel Daisy Molly Luna"), "she"),
    **dict.fromkeys(listed("Oscar Milo Felix Otto Pip"), "he"),
}
FAMILY = {"Mama": "she", "Papa": "he", "Grandma": "she", "Grandpa": "he"}
GENDER = {**HEROES, **FRIENDS, **FAMILY}

CHILDREN = {"girl": "she", "boy": "he"}
ANIMALS = listed(
    """fox rabbit bear mouse hedgehog squirrel kitten puppy duckling frog badger otter penguin lamb mole raccoon beaver
    fawn turtle pony piglet monkey elephant panda koala hamster goat donkey dragon robot"""
)
# Who comes by and helps has no name: "the owl".
HELPERS = listed(
    """owl stork crow goose heron deer toad tortoise moose horse cow swan woodpecker snail sheepdog gardener baker
    farmer postman fisherman miller shepherd teacher sailor carpenter painter"""
)
TALL = listed("giraffe stork heron moose crow gardener carpenter")  # reach what is high up
SMITHS = listed("carpenter gardener baker beaver tailor miller woodpecker sailor")  # mend what is broken
BABIES = listed("chick gosling cub calf kid bunny owlet lambkin")

NATURES = listed(
    """little small young curious cheerful gentle clever playful busy quiet funny lively polite merry brave kind shy"""
)
HELPER_NATURES = listed("old wise kind friendly tall big jolly gentle patient")
COLOURS = listed("red blue green yellow purple pink orange white golden silver")
LOOKS = listed("shiny tiny big new old pretty striped spotted bright")

# Things: the past and the plain form of what one does with them ({} is the thing).
THINGS = {
    "kite": ("flew {}", "fly {}"),
    "balloon": ("held {}", "hold {}"),
    "ball": ("bounced {}", "bounce {}"),
    "hat": ("wore {}", "wear {}"),
    "scarf": ("wore {}", "wear {}"),
    "ribbon": ("waved {}", "wave {}"),
    "flag": ("waved {}", "wave {}"),
    "drum": ("played {}", "play {}"),
    "flute": ("played {}", "play {}"),
    "whistle": ("blew {}", "blow {}"),
    "trumpet": ("played {}", "play {}"),
    "guitar": ("played {}", "play {}"),
    "doll": ("played with {}", "play with {}"),
    "wagon": ("pulled {}", "pull {}"),
    "boat": ("sailed {}", "sail {}"),
    "train": ("played with {}", "play with {}"),
    "puppet": ("played with {}", "play with {}"),
    "bell": ("rang {}", "ring {}"),
    "lantern": ("carried {}", "carry {}"),
    "basket": ("carried {}", "carry {}"),
    "umbrella": ("carried {}", "carry {}"),
    "scooter": ("rode {}", "ride {}"),
    "bicycle": ("rode {}", "ride {}"),
    "sled": ("pulled {}", "pull {}"),
    "truck": ("pushed {}", "push {}"),
    "hoop": ("rolled {}", "roll {}"),
    "marble": ("rolled {}", "roll {}"),
    "shell": ("listened to {}", "listen to {}"),
    "necklace": ("wore {}", "wear {}"),
    "crown": ("wore {}", "wear {}"),
    "camera": ("played with {}", "play with {}"),
    "telescope": ("looked through {}", "look through {}"),
    "book": ("read {}", "read {}"),
    "puzzle": ("played with {}", "play with {}"),
    "top": ("spun {}", "spin {}"),
    "pinwheel": ("held {}", "hold {}"),
    "wand": ("waved {}", "wave {}"),
    "cape": ("wore {}", "wear {}"),
    "teapot": ("carried {}", "carry {}"),
    "blanket": ("played with {}", "play with {}"),
}
SMALL = listed(
    """ball hat scarf ribbon flag flute whistle doll boat train puppet bell truck marble shell necklace crown camera
    book puzzle top wand"""
)  # can be lost
FLIES = listed("kite balloon ball hat scarf ribbon flag pinwheel cape umbrella")  # can be caught up high
BREAKS = listed(
    """kite drum flute guitar wagon boat train puppet lantern basket umbrella scooter bicycle sled truck necklace crown
    camera top wand pinwheel teapot"""
)
SHARED = listed(
    """ball drum wagon boat train scooter sled truck hoop marble telescope book puzzle top puppet kite camera"""
)
TREASURES = listed("crown bell shell telescope lantern necklace book flute marble trumpet")

# Places: at, to.
PLACES = {
    "park": ("in the park", "to the park"),
    "garden": ("in the garden", "to the garden"),
    "meadow": ("in the meadow", "to the meadow"),
    "forest": ("in the forest", "into the forest"),
    "hill": ("on the hill", "up the hill"),
    "pond": ("at the pond", "to the pond"),
    "river": ("by the river", "down to the river"),
    "beach": ("at the beach", "to the beach"),
    "orchard": ("in the orchard", "to the orchard"),
    "farm": ("on the farm", "to the farm"),
    "lake": ("at the lake", "to the lake"),
    "field": ("in the field", "to the field"),
    "valley": ("in the valley", "into the valley"),
    "village": ("in the village", "to the village"),
    "market": ("at the market", "to the market"),
    "bridge": ("at the bridge", "to the bridge"),
    "brook": ("by the brook", "to the brook"),
    "playground": ("on the playground", "to the playground"),
    "mill": ("at the mill", "to the mill"),
    "harbor": ("at the harbor", "down to the harbor"),
    "home": ("at home", "home"),
}
OUTDOORS = [place for place in PLACES if place != "home"]
WATERS = listed("pond river lake brook beach")
OPEN = listed("park meadow hill beach field valley farm playground")  # wind and room to run
WILD = listed("forest valley hill meadow orchard field")

SPOTS = [
    "under a bush",
    "behind a big stone",
    "in the tall grass",
    "beside the path",
    "under a bench",
    "behind the old oak",
    "between two roots",
    "next to a mossy log",
    "behind the fence",
    "under a pile of leaves",
    "in a patch of clover",
    "near the old well",
    "under the steps",
    "beside a tree stump",
]
PERCHES = [
    "in the top of a tree",
    "on the roof of the barn",
    "on a high branch",
    "in the old apple tree",
    "on top of a tall wall",
    "between two high branches",
]

# Lists of which a sentence takes one, by the name of its slot.
LISTS: dict[str, list[str]] = {
    "dwelling": [
        "a little house at the edge of the woods",
        "a tiny cottage by the stream",
        "a cozy home under the hill",
        "a small house with a blue door",
        "a hollow tree",
        "a snug little hut",
        "a round house with a red roof",
        "an old cottage near the sea",
        "a quiet street in a small town",
        "a warm house full of books",
    ],
    "hobby": [
        "to sing",
        "to dance",
        "to paint pictures",
        "to count the clouds",
        "to collect pretty stones",
        "to tell jokes",
        "to look at the stars",
        "to jump in puddles",
        "to pick flowers",
        "to hum little songs",
        "to make friends",
        "to climb and run",
        "to listen to the birds",
        "to ask questions",
    ],
    "sky": ["sunny", "bright", "warm", "cool", "quiet", "fresh", "lovely", "clear", "golden", "mild"],
    "day": ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"],
    "snack": [
        "a piece of bread",
        "an apple",
        "a honey cake",
        "a ripe pear",
        "a handful of berries",
        "a warm bun",
        "a cookie",
        "a sweet plum",
        "a slice of pie",
        "a carrot",
        "a cheese roll",
        "a bowl of soup",
    ],
    "sound": [
        "The birds were singing",
        "The bees were humming",
        "A soft breeze was blowing",
        "The flowers smelled sweet",
        "The leaves were rustling",
        "White clouds drifted by",
        "Butterflies danced in the air",
        "The grass was still wet with dew",
    ],
    "skill": [
        "swim",
        "skate",
        "whistle",
        "dance",
        "climb the tall tree",
        "jump over the brook",
        "row a boat",
        "juggle",
        "stand on one leg",
        "do a handstand",
        "ride a bicycle",
        "hop on one foot",
        "turn a cartwheel",
        "sing high notes",
    ],
    "tip": [
        "Take a deep breath first",
        "Start with one small step",
        "Look ahead, not down",
        "Go slowly and count to three",
        "Keep your back straight",
        "Do not hurry",
        "Hold my hand at first",
        "Close your eyes and think of a song",
    ],
    "chore": [
        "swept the floor",
        "watered the flowers",
        "carried the wood",
        "picked the apples",
        "washed the windows",
        "fed the hens",
        "pulled the weeds",
        "stacked the boxes",
        "cleaned the shed",
        "raked the leaves",
        "delivered the letters",
        "painted the fence",
    ],
    "cake": [
        "a honey cake",
        "a cherry pie",
        "a carrot cake",
        "an apple tart",
        "a plum cake",
        "a berry pie",
        "a nut cake",
        "a lemon cake",
        "a pear pie",
        "a pumpkin pie",
    ],
    "part": ["flour", "sugar", "butter", "milk", "honey", "salt", "cinnamon", "cream"],
    "plant": ["sunflower", "pumpkin", "rose", "bean", "tulip", "melon", "strawberry", "daisy", "tomato", "pea"],
    "pest": ["a cold wind", "a hungry slug", "a big storm", "a heavy rain", "a hot dry week", "a cheeky crow"],
    "guard": [
        "built a little fence around it",
        "put a glass over it",
        "tied it to a strong stick",
        "covered it with a blanket of leaves",
        "made a small roof for it",
        "sat beside it all day",
    ],
    "lure": ["a blue butterfly", "a shiny beetle", "a tiny bird", "a bright dragonfly", "a white moth"],
    "light": ["a firefly", "a glowing lamp", "the evening star", "the round moon", "a little candle"],
    "crockery": ["vase", "cup", "jug", "plate", "bowl", "flowerpot", "mirror", "clock"],
    "paste": ["glue", "tape", "string", "a nail and a hammer", "wire", "a needle and thread", "a drop of wax"],
    "reach": ["jumped", "threw a stick", "stood on a box", "shook the trunk", "climbed a ladder", "used a long pole"],
    "fetch": ["stretched out", "reached up high", "went up carefully", "gave a great leap", "stood on tiptoe"],
    "goal": ["the big oak", "the old mill", "the red gate", "the stone bridge", "the top of the hill", "the far fence"],
    "prize": ["a gold medal", "a blue ribbon", "a silver cup", "a crown of flowers", "a big jar of jam"],
    "heaven": ["the moon", "the evening star", "the rainbow", "the sun", "the little cloud"],
    "climb": ["a chair", "the roof", "the tallest tree", "a high wall", "a ladder", "a pile of boxes"],
    "bowlful": [
        "the bucket by the well",
        "the still pond",
        "the puddle on the path",
        "the little mirror",
        "the clear brook",
    ],
    "damage": [
        "blew the roof away",
        "broke all the windows",
        "filled the rooms with water",
        "knocked down the door",
        "made the chimney fall",
    ],
    "gap": [
        "The bridge was broken",
        "A deep river was in the way",
        "A fallen tree blocked the path",
        "The gate was locked",
    ],
    "cross": [
        "laid a long plank across",
        "built a raft",
        "found a narrow way around",
        "made steps out of stones",
        "tied a strong rope",
    ],
    "game": ["tag", "hide and seek", "leapfrog", "catch", "pirates", "follow the leader", "hopscotch", "knights"],
    "warmth": ["hot cocoa", "warm milk", "sweet tea", "hot soup", "apple juice", "lemonade", "berry juice"],
    "guess": [
        "Maybe it is over there",
        "Perhaps we should look there",
        "Let us look a little more",
        "It cannot be far",
    ],
    "virtue": ["kind", "helpful", "full of ideas", "good at listening", "always ready to laugh", "never mean"],
    "cheer": ["Hooray", "Hurray", "How wonderful", "What luck", "Oh, how lovely", "Look at that", "Yippee"],
    "woe": ["Oh no", "Oh dear", "What a pity", "Oh, what now", "Dear me"],
    "stars": ["The stars came out", "The moon was shining", "The crickets began to sing", "The sky turned pink"],
}
