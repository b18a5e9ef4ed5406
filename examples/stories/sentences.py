"""What can be told in any story, sentence by sentence: each with what must be true before and what is true after it."""

from __future__ import annotations

from .forms import form

BEGINNINGS = [
    form(
        "open",
        "Once upon a time, there was {a.new}.",
        "Once upon a time, {a.new} lived in {dwelling}.",
        "Once upon a time, in {dwelling}, there lived {a.new}.",
        "Long ago, {a.new} lived in {dwelling}.",
        "There once was {a.new} who lived in {dwelling}.",
        "In {dwelling} lived {a.new}.",
        adds="at a home; hero a",
    ),
    form(
        "hobby",
        "{A} loved {hobby}.",
        "{A} liked {hobby} more than anything.",
        "Every day, {a} found time {hobby}.",
        "What {a} liked best was {hobby}.",
        needs="hero a",
    ),
    form(
        "virtue",
        "{A} was {virtue}, and everyone knew it.",
        "Everyone said that {a} was {virtue}.",
        "All the neighbors liked {a}, who was {virtue}.",
        needs="hero a",
    ),
    form(
        "morning",
        "One {sky} morning, {a} woke up early.",
        "One {day}, {a} got up with the sun.",
        "One {sky} day, {a} jumped out of bed and smiled.",
        "On a {sky} {day}, {a} woke up and looked out of the window.",
        "It was a {sky} {day} morning, and {a} was wide awake.",
        needs="at a home; !day",
        adds="day",
    ),
    form(
        "have",
        "{A} had {t.new}.",
        "{A} had {t.new} and took it everywhere.",
        "Of all {a.his} things, {a} loved {t.new} the most.",
        "For {a.his} birthday, {a} had been given {t.new}.",
        needs="!holds * t",
        adds="holds a t; owner a t",
    ),
    form(
        "friend",
        "{A} had a friend, {b.new}.",
        "{A}'s best friend was {b.new}.",
        "Next door to {a} lived {b.new}, and the two were good friends.",
        needs="at a home",
        adds="at b next; friends a b",
    ),
]

WAYS = [
    form(
        "go",
        "{A} went {p.to}.",
        "{A} walked {p.to}.",
        "{A} skipped all the way {p.to}.",
        "{A} ran {p.to}.",
        "So {a} set off {p.to}.",
        "After a while, {a} came {p.to}.",
        needs="!at a p",
        adds="at a p",
    ),
    form(
        "go_both",
        "{A} and {b} went {p.to}.",
        "{A} and {b} walked {p.to} together.",
        "Together, {a} and {b} ran {p.to}.",
        "So {a} took {b} along {p.to}.",
        needs="with a b; !at a p",
        adds="at a p; at b p",
    ),
    form(
        "home",
        "Then {a} went home.",
        "Soon it was time to go, and {a} walked home.",
        "{A} walked home with a light heart.",
        "In the evening, {a} skipped all the way home.",
        needs="!at a home; !trouble *",
        adds="at a home",
    ),
    form("scene", "{Sound}.", "{Sound}, and all was well.", subject="", needs="!trouble *; !scene", adds="scene"),
    form(
        "meet",
        "Just then, {a} met {b.new}.",
        "There, {a} met {b.new}.",
        "Soon {a} saw {b.new} coming closer.",
        "Not far away, {a} saw {b.new}.",
        "Along came {b.new} and looked at {a}.",
        adds="at b @a",
    ),
    form(
        "comes",
        "Just then, {b} came to see {a}.",
        "Soon {b} came along and found {a}.",
        "{B} heard {a} and came running.",
        "Luckily, {b} was not far away and came to {a}.",
        subject="b",
        needs="!with a b",
        adds="at b @a",
    ),
]

TALK = [
    form(
        "greet",
        '"Hello, {b.call}!" called {a}.',
        '"Good morning, {b.call}!" said {a}.',
        '"Come with me, {b.call}!" said {a}.',
        "{A} waved to {b}.",
        needs="with a b",
    ),
    form(
        "why_sad",
        '"Why are you so sad, {a.call}?" asked {b}.',
        '"What is the matter, {a.call}?" asked {b} softly.',
        '"Can I help you, {a.call}?" asked {b}.',
        "{B} looked at {a} and asked what was wrong.",
        subject="b",
        needs="with a b; trouble *",
    ),
    form(
        "tells",
        "{A} told {b} everything.",
        "So {a} told {b} what had happened.",
        "{A} sniffed and told {b} the whole story.",
        needs="with a b; trouble *; !knows b",
        adds="knows b",
    ),
    form(
        "offer",
        '"Do not worry," said {b}. "I will help you."',
        '"Leave it to me," said {b} with a smile.',
        '{B} nodded. "We will think of something."',
        '"Dry your eyes," said {b}. "I know what to do."',
        '"Friends help each other," said {b}.',
        subject="b",
        needs="knows b; trouble *",
        adds="helps b",
    ),
    form(
        "sad",
        "{A} was very sad.",
        "{A} sat down and cried.",
        "{A} felt sad and did not know what to do.",
        "A tear ran down, and then another. {A} was sad.",
        needs="trouble *; !feels a sad",
        adds="feels a sad",
    ),
    form(
        "thanks",
        '"Thank you, {b.call}!" said {a}.',
        '"Thank you so much!" said {a}, and hugged {b}.',
        '"You are the best, {b.call}!" cried {a}.',
        "{A} thanked {b} with a big hug.",
        '{A} smiled at {b}. "Thank you for helping me."',
        needs="with a b; !trouble *",
        adds="feels a happy; bond a b",
    ),
    form(
        "snack",
        "{A} gave {b} {snack}, and they ate it together.",
        "To say thank you, {a} shared {snack} with {b}.",
        "Then {a} and {b} sat down and shared {snack}.",
        needs="with a b; !trouble *",
        adds="bond a b",
    ),
    form(
        "happy",
        "{A} laughed and danced with joy.",
        '"{Cheer}!" cried {a}.',
        "{A} was so happy that {a.he} began to sing.",
        "{A} jumped up and down with joy.",
        needs="!trouble *",
        adds="feels a happy",
    ),
]

ENDINGS = [
    form(
        "end_friends",
        "From that day on, {a} and {b} were the best of friends.",
        "After that, {a} and {b} met every day.",
        "{A} and {b} stayed friends for ever.",
        "And whenever {b} needed help, {a} came at once.",
        needs="!wish * *; !trouble *; bond a b",
        adds="over; feels a happy",
    ),
    form(
        "end_sleep",
        "That night, {a} fell asleep with a smile.",
        "{Stars}, and {a} slept well that night.",
        "{Stars}. It had been a wonderful day for {a}.",
        "In bed that evening, {a} thought of the day and smiled.",
        needs="!wish * *; !trouble *; at a home",
        adds="over; feels a happy",
    ),
    form(
        "the_end",
        "The end.",
        "And that was that.",
        "And they all lived happily ever after.",
        subject="",
        needs="over",
        adds="end",
    ),
]

# What a story teaches, by what went wrong in it.
LESSONS = {
    "lost": ("it is good to look after the things we love", "lost things can be found when friends look together"),
    "broken": ("broken things can be mended", "a thing that friends have mended is dearer than a new one"),
    "stuck": ("asking for help is better than crying", "even the wind cannot beat good friends"),
    "earn": ("work makes a wish come true", "what we work for makes us proud"),
    "friend": ("a little kindness makes a friend", "the shy ones are often the best friends"),
    "rain": ("a rainy day can be the best day", "rain is only water when a friend is near"),
    "skill": ("we only need to try again", "everybody falls before they can fly"),
    "quarrel": ("sharing makes everything twice as nice", "taking turns is better than shouting"),
    "helping": ("helping others makes a day beautiful", "nobody is too small to help"),
    "baking": ("good neighbors are worth more than gold", "a gift made with love is the best gift"),
    "way": ("it is wise to stay on the path", "there is always a light in the dark"),
    "honest": ("the truth is the best way out", "telling the truth makes the heart light"),
    "seed": ("good things take time", "with patience small things become great"),
    "race": ("being kind is better than winning", "it is nicer to win together"),
    "moon": ("even far things can be near", "wishes can come true in another way"),
    "storm": ("a warm home is best when it is shared", "there is always room for a friend"),
    "treasure": ("the best treasure is a good friend", "every way is shorter with a friend"),
}
MORALS = [
    form(
        f"moral_{theme}",
        *(
            text.replace("*", moral)
            for moral in morals
            for text in ("{A} had learned that *.", "Now {a} knew that *.", "And so {a} learned that *.")
        ),
        needs=f"theme {theme}; !trouble *; !wish * *",
        adds="over; feels a happy",
    )
    for theme, morals in LESSONS.items()
]
