"""A world of real language: which of two answers is in the language that was asked for.

A question asks for an English sentence in another language. One answer is that sentence in the
language asked for, the other is the same sentence in a wrong one (or left in English). Any model
that has read these languages can learn it, and one that judges by place can't: the right answer is
as often first as second. Length tells little: of two answers that differ in length the longer one
is right in 55 % of the training rows and 47 % of the held-out ones (in "unseen" in 36 %).

SFT imitates a careless annotator, who names the two languages the wrong way round in two rows of
five. The gold scores are always right. So imitation learns the form and little else, and GRPO must
learn to tell the languages apart.

Sentences are made of a subject, what it does, and where or when. Training shares no such part with
the other splits: "train" draws from all but the last few of each, "heldout" from those. "unseen"
draws from these too, but asks for a language that no training row asks for or holds. All is a pure
function of the split.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from jlrm.config import UsageError, nearest

# Subjects; what they do; where or when. Item i says the same in every language.
PARTS: dict[str, tuple[str, str, str]] = {
    "English": (
        "my brother;my sister;the teacher;the old man;the young woman;our neighbour;the doctor;"
        "the child;the cook;the farmer;the girl;the boy;his mother;her father;the postman;"
        "the singer;the baker;the captain;the nurse;the queen;the painter;my uncle;the tourist;"
        "the student",
        "buys a red apple;reads a long book;drinks a cup of tea;writes a letter;sings an old song;"
        "is looking for the keys;eats warm bread;sells fresh fish;draws a small house;"
        "is waiting for the bus;plays the guitar;washes the windows;tells a story;opens the door;"
        "makes the soup;learns a new word;carries a heavy bag;counts the coins;"
        "repairs the bicycle;feeds the cats;watches the birds;cuts the flowers;closes the shop;"
        "paints the wall",
        "in the garden;at the market;in the kitchen;on Monday;every morning;after dinner;"
        "near the station;by the river;in winter;today;before work;at school;in the evening;"
        "on the bridge",
    ),
    "French": (
        "mon frère;ma sœur;le professeur;le vieil homme;la jeune femme;notre voisin;le médecin;"
        "l'enfant;le cuisinier;le fermier;la fille;le garçon;sa mère;son père;le facteur;"
        "la chanteuse;le boulanger;le capitaine;l'infirmière;la reine;le peintre;mon oncle;"
        "le touriste;l'étudiant",
        "achète une pomme rouge;lit un long livre;boit une tasse de thé;écrit une lettre;"
        "chante une vieille chanson;cherche les clés;mange du pain chaud;vend du poisson frais;"
        "dessine une petite maison;attend le bus;joue de la guitare;lave les fenêtres;"
        "raconte une histoire;ouvre la porte;prépare la soupe;apprend un nouveau mot;"
        "porte un sac lourd;compte les pièces;répare le vélo;nourrit les chats;"
        "regarde les oiseaux;coupe les fleurs;ferme le magasin;peint le mur",
        "dans le jardin;au marché;dans la cuisine;lundi;chaque matin;après le dîner;"
        "près de la gare;au bord de la rivière;en hiver;aujourd'hui;avant le travail;à l'école;"
        "le soir;sur le pont",
    ),
    "Spanish": (
        "mi hermano;mi hermana;el profesor;el anciano;la joven;nuestro vecino;el médico;el niño;"
        "el cocinero;el granjero;la chica;el chico;su madre;su padre;el cartero;la cantante;"
        "el panadero;el capitán;la enfermera;la reina;el pintor;mi tío;el turista;el estudiante",
        "compra una manzana roja;lee un libro largo;bebe una taza de té;escribe una carta;"
        "canta una canción antigua;busca las llaves;come pan caliente;vende pescado fresco;"
        "dibuja una casa pequeña;espera el autobús;toca la guitarra;lava las ventanas;"
        "cuenta una historia;abre la puerta;prepara la sopa;aprende una palabra nueva;"
        "lleva una bolsa pesada;cuenta las monedas;repara la bicicleta;alimenta a los gatos;"
        "mira los pájaros;corta las flores;cierra la tienda;pinta la pared",
        "en el jardín;en el mercado;en la cocina;el lunes;cada mañana;después de la cena;"
        "cerca de la estación;junto al río;en invierno;hoy;antes del trabajo;en la escuela;"
        "por la noche;en el puente",
    ),
    "German": (
        "mein Bruder;meine Schwester;der Lehrer;der alte Mann;die junge Frau;unser Nachbar;"
        "der Arzt;das Kind;der Koch;der Bauer;das Mädchen;der Junge;seine Mutter;ihr Vater;"
        "der Briefträger;die Sängerin;der Bäcker;der Kapitän;die Krankenschwester;die Königin;"
        "der Maler;mein Onkel;der Tourist;der Student",
        "kauft einen roten Apfel;liest ein langes Buch;trinkt eine Tasse Tee;"
        "schreibt einen Brief;singt ein altes Lied;sucht die Schlüssel;isst warmes Brot;"
        "verkauft frischen Fisch;zeichnet ein kleines Haus;wartet auf den Bus;spielt Gitarre;"
        "putzt die Fenster;erzählt eine Geschichte;öffnet die Tür;kocht die Suppe;"
        "lernt ein neues Wort;trägt eine schwere Tasche;zählt die Münzen;repariert das Fahrrad;"
        "füttert die Katzen;beobachtet die Vögel;schneidet die Blumen;schließt den Laden;"
        "streicht die Wand",
        "im Garten;auf dem Markt;in der Küche;am Montag;jeden Morgen;nach dem Abendessen;"
        "in der Nähe des Bahnhofs;am Fluss;im Winter;heute;vor der Arbeit;in der Schule;am Abend;"
        "auf der Brücke",
    ),
    "Italian": (
        "mio fratello;mia sorella;l'insegnante;il vecchio;la giovane donna;il nostro vicino;"
        "il medico;il bambino;il cuoco;il contadino;la ragazza;il ragazzo;sua madre;suo padre;"
        "il postino;la cantante;il fornaio;il capitano;l'infermiera;la regina;il pittore;mio zio;"
        "il turista;lo studente",
        "compra una mela rossa;legge un libro lungo;beve una tazza di tè;scrive una lettera;"
        "canta una vecchia canzone;cerca le chiavi;mangia pane caldo;vende pesce fresco;"
        "disegna una piccola casa;aspetta l'autobus;suona la chitarra;lava le finestre;"
        "racconta una storia;apre la porta;prepara la zuppa;impara una parola nuova;"
        "porta una borsa pesante;conta le monete;ripara la bicicletta;dà da mangiare ai gatti;"
        "guarda gli uccelli;taglia i fiori;chiude il negozio;dipinge il muro",
        "in giardino;al mercato;in cucina;lunedì;ogni mattina;dopo cena;vicino alla stazione;"
        "in riva al fiume;in inverno;oggi;prima del lavoro;a scuola;la sera;sul ponte",
    ),
    "Dutch": (
        "mijn broer;mijn zus;de leraar;de oude man;de jonge vrouw;onze buurman;de dokter;"
        "het kind;de kok;de boer;het meisje;de jongen;zijn moeder;haar vader;de postbode;"
        "de zangeres;de bakker;de kapitein;de verpleegster;de koningin;de schilder;mijn oom;"
        "de toerist;de student",
        "koopt een rode appel;leest een lang boek;drinkt een kop thee;schrijft een brief;"
        "zingt een oud lied;zoekt de sleutels;eet warm brood;verkoopt verse vis;"
        "tekent een klein huis;wacht op de bus;speelt gitaar;wast de ramen;vertelt een verhaal;"
        "opent de deur;maakt de soep;leert een nieuw woord;draagt een zware tas;telt de munten;"
        "repareert de fiets;voert de katten;kijkt naar de vogels;snijdt de bloemen;"
        "sluit de winkel;verft de muur",
        "in de tuin;op de markt;in de keuken;op maandag;elke ochtend;na het avondeten;"
        "bij het station;aan de rivier;in de winter;vandaag;vóór het werk;op school;'s avonds;"
        "op de brug",
    ),
}
SOURCE, UNSEEN = "English", "Dutch"
HELD_OUT = (6, 6, 4)  # how many of the last subjects, actions and places no training row has
CARELESS = 0.4  # share of written judgements that have the two languages the wrong way round
SCORES = (9, 2)  # gold scores of the right and the wrong answer
NUM_ROWS = {"train": 4000, "heldout": 200, "unseen": 144}


def rows(split: str) -> Iterator[dict[str, Any]]:
    """Return the rows of a split, a key of NUM_ROWS ("": train), as a file would hold them.

    A row has gold scores, a written judgement ("reasoning" and "judged") in the training split, and
    the languages of both answers. No two rows of a split ask for the same sentence in the same
    language.

    Raises:
      UsageError: there is no such split.
    """
    split = split or "train"
    if split not in NUM_ROWS:
        raise UsageError(f"languages has no split '{split}'. {nearest(split, NUM_ROWS)}")
    return _rows(split)


def _rows(split: str) -> Iterator[dict[str, Any]]:
    rng = np.random.default_rng(list(NUM_ROWS).index(split))
    seen = [name for name in PARTS if name != UNSEEN]
    asked_for = [UNSEEN] if split == "unseen" else [name for name in seen if name != SOURCE]
    choices = list(itertools.product(asked_for, *_parts(split)))
    for number, choice in enumerate(rng.permutation(len(choices))[: NUM_ROWS[split]]):
        asked, *sentence = choices[choice]
        wrong = str(rng.choice([name for name in seen if name != asked]))
        languages = (asked, wrong) if rng.random() < 0.5 else (wrong, asked)
        gold = tuple(SCORES[language != asked] for language in languages)
        row: dict[str, Any] = {
            "id": f"languages-{split}-{number}",
            "question": f"Say in {asked}: {_say(SOURCE, sentence)}.",
            "answer_1": _say(languages[0], sentence),
            "answer_2": _say(languages[1], sentence),
            "score_1": gold[0],
            "score_2": gold[1],
            "languages": languages,
        }
        if split == "train":
            step = -1 if rng.random() < CARELESS else 1
            row["reasoning"] = f"{asked}? " + ", ".join(
                f"{place}: {language}" for place, language in enumerate(languages[::step], start=1)
            )
            row["judged"] = gold[::step]
        yield row


def _parts(split: str) -> list[list[int]]:
    """Return the numbers of the subjects, actions and places that a split draws from."""
    lengths = [len(part.split(";")) for part in PARTS[SOURCE]]
    kept = [slice(-n) if split == "train" else slice(-n, None) for n in HELD_OUT]
    return [list(range(length))[part] for length, part in zip(lengths, kept, strict=True)]


def _say(language: str, sentence: list[int]) -> str:
    """Return a sentence in a language, its parts given by their numbers."""
    parts = (part.split(";")[i] for part, i in zip(PARTS[language], sentence, strict=True))
    text = " ".join(parts)
    return text[0].upper() + text[1:]
