"""What the miniature world is about: forty topics with four facts each. Plain data, read by `language` alone.

A fact is a predicate of the topic. Within one kind and aspect all predicates differ: a sentence says whose fact it is.
"""

from dataclasses import dataclass

ASPECTS = ("home", "looks", "needs", "talents")
"""The four things that a request can ask about a topic; index i belongs to ``Topic.facts[i]``."""


@dataclass(frozen=True, slots=True)
class Topic:
    """One topic. ``Topic("otter", "animal", ("lives in clean rivers", ...))``; `facts` [4], one per aspect."""

    name: str
    kind: str
    facts: tuple[str, str, str, str]


_VERBS = {
    "animal": ("lives in", "has", "eats", "can"),
    "plant": ("grows in", "has", "wants", "can"),
    "machine": ("stands in", "has", "runs on", "can"),
}

_TABLE = """
animal | otter    | clean rivers     | brown fur        | fresh fish      | crack shells
animal | owl      | old barns        | round eyes       | small mice      | hunt at night
animal | camel    | hot deserts      | a tall hump      | dry thorns      | carry heavy loads
animal | bee      | wooden hives     | yellow stripes   | sweet nectar    | make honey
animal | wolf     | northern forests | sharp teeth      | wild deer       | howl at the moon
animal | penguin  | icy coasts       | black wings      | silver krill    | dive under ice
animal | frog     | muddy ponds      | green skin       | slow flies      | jump very far
animal | spider   | dark corners     | eight legs       | caught moths    | spin thin webs
animal | horse    | open meadows     | a long mane      | golden oats     | pull a cart
animal | squirrel | hollow trees     | a bushy tail     | hidden nuts     | climb any trunk
animal | dolphin  | warm seas        | a smooth nose    | quick squid     | whistle to friends
animal | ant      | sandy hills      | a narrow waist   | fallen crumbs   | lift many leaves
animal | parrot   | rainy jungles    | red feathers     | soft fruit      | repeat human words
animal | goat     | rocky mountains  | curved horns     | short grass     | stand on cliffs
plant  | rose     | sunny gardens    | pink petals      | deep soil       | scent a room
plant  | oak      | ancient woods    | broad branches   | slow years      | live for centuries
plant  | cactus   | empty plains     | pointed needles  | little water    | store the rain
plant  | mint     | cool kitchens    | jagged leaves    | wet roots       | flavour hot tea
plant  | tulip    | flat fields      | a single cup     | cold winters    | announce the spring
plant  | fern     | shady valleys    | curled fronds    | misty air       | spread by spores
plant  | lavender | stony slopes     | purple spikes    | bright sun      | calm tired minds
plant  | bamboo   | humid groves     | hollow stems     | steady warmth   | grow a metre daily
plant  | willow   | river banks      | hanging twigs    | flooded ground  | cure a headache
plant  | pine     | high ridges      | brown cones      | acid earth      | give sticky resin
plant  | moss     | damp walls       | tiny cushions    | constant shade  | soften bare stone
plant  | lily     | quiet lakes      | white trumpets   | still pools     | float on water
plant  | wheat    | wide farms       | golden ears      | summer heat     | feed whole nations
machine | clock     | church towers   | two hands        | a wound spring  | count the hours
machine | lamp      | dim hallways    | a glass shade    | mains power     | light a page
machine | bicycle   | narrow sheds    | thin wheels      | strong legs     | climb steep roads
machine | piano     | concert halls   | ivory keys       | patient tuning  | fill a stage
machine | camera    | photo studios   | a curved lens    | small batteries | freeze a moment
machine | kettle    | busy cafes      | a steel spout    | blue gas        | boil fresh water
machine | loom      | weaving mills   | crossed threads  | foot pedals     | make fine cloth
machine | compass   | ship cabins     | a loose needle   | the magnetic field | point to the north
machine | robot     | modern factories | metal arms      | written code    | weld heavy doors
machine | tractor   | country barns   | huge tyres       | thick diesel    | plough hard ground
machine | telescope | hilltop domes   | a long tube      | clear nights    | show distant stars
machine | printer   | crowded offices | a paper tray     | black ink       | copy a letter
machine | windmill  | breezy coasts   | canvas sails     | moving air      | grind dry corn
"""


def _read(row: str) -> Topic:
    kind, name, *objects = (cell.strip() for cell in row.split("|"))
    home, looks, needs, talents = (f"{verb} {object}" for verb, object in zip(_VERBS[kind], objects, strict=True))
    return Topic(name, kind, (home, looks, needs, talents))


TOPICS: tuple[Topic, ...] = tuple(_read(row) for row in _TABLE.strip().splitlines())
BY_NAME: dict[str, Topic] = {topic.name: topic for topic in TOPICS}
BY_KIND: dict[str, tuple[Topic, ...]] = {kind: tuple(t for t in TOPICS if t.kind == kind) for kind in _VERBS}
