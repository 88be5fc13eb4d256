"""The corpora whose file names carry the labels, a row each.

Licences are the user's to check. "From documentation" means that the naming was taken from the publisher's page or from
published metadata, and was never tried on the corpus itself.
"""

from mser_dist.corpora.naming import Naming

EMODB_TEXTS = {
    "a01": "Der Lappen liegt auf dem Eisschrank.",
    "a02": "Das will sie am Mittwoch abgeben.",
    "a04": "Heute abend könnte ich es ihm sagen.",
    "a05": "Das schwarze Stück Papier befindet sich da oben neben dem Holzstück.",
    "a07": "In sieben Stunden wird es soweit sein.",
    "b01": "Was sind denn das für Tüten, die da unter dem Tisch stehen?",
    "b02": "Sie haben es gerade hochgetragen und jetzt gehen sie wieder runter.",
    "b03": "An den Wochenenden bin ich jetzt immer nach Hause gefahren und habe Agnes besucht.",
    "b09": "Ich will das eben wegbringen und dann mit Karl was trinken gehen.",
    "b10": "Die wird auf dem Platz sein, wo wir sie immer hinlegen.",
}
_RAVDESS_WORDS = ("neutral", "calm", "happy", "sad", "angry", "fearful", "disgust", "surprised")
_RAVDESS_TEXTS = {"01": "Kids are talking by the door.", "02": "Dogs are sitting by the door."}
_F_M = {"F": "female", "M": "male"}

NAMED = {
    "aesdd": Naming(
        layout="emotion of a d f h s, utterance, (speaker): a03 (3).wav",
        language="el",
        clips=603,  # 604, of which s05 (3) is damaged
        pattern=r"(?P<emotion>[a-z])\d+ ?\(0*(?P<speaker>\d+)\)[a-z]?",  # "(01)" and "(1)" are one speaker
        emotions={"a": "anger", "d": "disgust", "f": "fear", "h": "happiness", "s": "sadness"},
        left_out=r"s0*5 ?\(0*3\)[a-z]?",
    ),
    "ased": Naming(  # from documentation; speakers by their number alone
        layout="emotion of n f h s a, sentence, repetition, gender 01 female or 02, speaker: a5-06-02-02-60.wav",
        language="am",
        clips=2474,
        pattern=r"(?P<emotion>[a-zA-Z])\d+-\d+-\d+-(?P<gender>0[12])-(?P<speaker>\d+)",  # S4-04-02-01-29 is there too
        emotions={
            letter: word
            for word in ("neutral", "fear", "happy", "sad", "angry")
            for letter in (word[0], word[0].upper())
        },
        genders={"01": "female", "02": "male"},
    ),
    "cafe": Naming(
        layout="speaker-emotion-intensity-sentence: 12-P-2-5.wav",
        language="fr",
        clips=936,
        pattern=r"(?P<speaker>\d\d)-(?P<emotion>[A-Z])-\d-\d",
        emotions={
            "C": "anger",
            "D": "disgust",
            "J": "happiness",
            "N": "neutral",
            "P": "fear",
            "S": "surprise",
            "T": "sadness",
        },
    ),
    "casia": Naming(  # from documentation; the free part, of 4 speakers; the whole has 9600 clips
        layout="speaker/emotion/number: liuchanhg/angry/201.wav",
        language="zh",
        clips=1200,
        pattern=r"(?P<speaker>[A-Za-z]+)/(?P<emotion>[a-z]+)/\d+",
    ),
    "cremad": Naming(
        layout="speaker_sentence_EMO_level: 1001_DFA_ANG_XX.wav",
        language="en",
        clips=7441,  # 7442, of which one is silent
        pattern=r"(?P<speaker>\d{4})_[A-Z]{3}_(?P<emotion>[A-Z]{3})_[A-Z]{1,2}",
        emotions={"ANG": "anger", "DIS": "disgust", "FEA": "fear", "HAP": "happy", "NEU": "neutral", "SAD": "sad"},
        left_out="1076_MTI_SAD_XX",
    ),
    "emodb": Naming(  # http://emodb.bilderbar.info
        layout="speaker 03, text a01, emotion of W L E A F T N, take: 03a01Fa.wav",
        language="de",
        clips=535,
        pattern=r"(?P<speaker>\d\d)(?P<text>[ab]\d\d)(?P<emotion>[A-Z])[a-z]?",
        emotions={
            "W": "anger",
            "L": "boredom",
            "E": "disgust",
            "A": "fear",
            "F": "happiness",
            "T": "sadness",
            "N": "neutral",
        },
        genders=dict.fromkeys(("03", "10", "11", "12", "15"), "male"),
        other_gender="female",
        texts=EMODB_TEXTS.get,
    ),
    "emovdb": Naming(  # from documentation (OpenSLR 115)
        layout="speaker_Emotion/ or speaker/Emotion/, of bea jenie josh sam: bea_Amused/amused_1-15_0001.wav",
        language="en",
        clips=6887,
        pattern=r"(?P<speaker>bea|jenie|josh|sam)[_/](?P<emotion>[A-Za-z]+)/[^/]+",
        genders={"bea": "female", "jenie": "female", "josh": "male", "sam": "male"},
    ),
    "emovo": Naming(
        layout="emotion-speaker-sentence: gio-f2-b2.wav",
        language="it",
        clips=588,
        pattern=r"(?P<emotion>[a-z]{3})-(?P<speaker>(?P<gender>[fm])\d)-\w+",
        emotions={
            "dis": "disgust",
            "gio": "joy",
            "neu": "neutral",
            "pau": "fear",
            "rab": "anger",
            "sor": "surprise",
            "tri": "sadness",
        },
        genders={"f": "female", "m": "male"},
    ),
    "esd": Naming(  # from documentation; its own splits share the speakers, and are not taken over
        layout="speaker/Emotion/, maybe train/ test/ evaluation/: 0011/Angry/0011_000351.wav (to 0010 zh, then en)",
        language="zh",
        clips=35000,
        pattern=r"(?P<speaker>00\d\d)/(?P<emotion>[A-Z][a-z]+)/(?:(?:train|test|evaluation)/)?\d{4}_\d{6}",
        languages={f"00{number}": "en" for number in range(11, 21)},
    ),
    "jl": Naming(  # from documentation
        layout="speaker_emotion_sentence_session: male2_concerned_6b_1.wav",
        language="en",
        clips=2400,
        pattern=r"(?P<speaker>(?P<gender>(?:fe)?male)\d)_(?P<emotion>[a-z]+)_\d+[a-z]_\d",
        genders={"female": "female", "male": "male"},
    ),
    "mesd": Naming(  # from documentation; it does not tell its speakers apart, only a woman's, man's or child's voice
        layout="Emotion_voice of F M C_corpus_word: Anger_F_A_tarde.wav",
        language="es",
        clips=862,
        pattern=r"(?P<emotion>[A-Z][a-z]+)_(?P<speaker>[FMC])_[AB]_(?P<text>[^/]+)",
        genders=_F_M,
        texts=lambda word: word.replace("_", " "),
    ),
    "nemo": Naming(
        layout="speaker_emotion_number: TP0_anger_10.wav",
        language="pl",
        clips=4481,
        pattern=r"(?P<speaker>[A-Z]{2}\d)_(?P<emotion>[a-z]+)_\d+",
    ),
    "ravdess": Naming(
        layout="seven numbers: 03-01-05-01-02-01-12.wav; songs (channel 02) are left out",
        language="en",
        clips=1440,
        pattern=r"\d\d-\d\d-(?P<emotion>\d\d)-\d\d-(?P<text>\d\d)-\d\d-(?P<speaker>\d\d)",
        emotions={f"0{number}": word for number, word in enumerate(_RAVDESS_WORDS, 1)},
        genders={f"{number:02d}": "male" if number % 2 else "female" for number in range(1, 25)},
        texts=_RAVDESS_TEXTS.get,
        left_out=r"\d\d-02-.*",
    ),
    "savee": Naming(  # `sa` and `su` are tried before the single letters
        layout="speaker folder, emotion, number: DC/a01.wav or DC_a01.wav",
        language="en",
        clips=480,
        pattern=r"(?P<speaker>[A-Z]{2})[/_](?P<emotion>sa|su|[a-z])\d\d",
        emotions={
            "sa": "sadness",
            "su": "surprise",
            "a": "anger",
            "d": "disgust",
            "f": "fear",
            "h": "happiness",
            "n": "neutral",
        },
        other_gender="male",
    ),
    "shemo": Naming(
        layout="speaker M36, emotion of A N S W H F, number: M36S02.wav",
        language="fa",
        clips=3000,
        pattern=r"(?P<speaker>(?P<gender>[MF])\d\d)(?P<emotion>[A-Z])\d+",
        emotions={"A": "anger", "N": "neutral", "S": "sadness", "W": "surprise", "H": "happiness", "F": "fear"},
        genders=_F_M,
    ),
    "subesco": Naming(  # from documentation
        layout="gender_number_name_S_sentence_EMOTION_take: F_02_MONIKA_S_4_ANGRY_1.wav",
        language="bn",
        clips=7000,
        pattern=r"(?P<speaker>(?P<gender>[MF])_\d+_[A-Z]+)_S_\d+_(?P<emotion>[A-Z]+)_\d+",
        genders=_F_M,
    ),
    "tess": Naming(
        layout="speaker_word_emotion: OAF_lid_fear.wav (ps: pleasant surprise)",
        language="en",
        clips=2800,
        pattern=r"(?P<speaker>[OY]A)F?_(?P<text>[a-z]+)_(?P<emotion>[A-Za-z]+)",
        emotions={
            spelled: word
            for name, word in [
                *((w, w) for w in ("angry", "disgust", "fear", "happy", "neutral", "sad")),
                ("ps", "surprise"),
            ]
            for spelled in (name, name.title())
        },
        speakers={"OA": "OAF", "YA": "YAF"},
        other_gender="female",
        texts="Say the word {}.".format,
    ),
    "turev": Naming(  # from documentation
        layout="Emotion/speaker_…: Angry/1157_kz_acik.wav",
        language="tr",
        clips=1735,
        pattern=r"(?P<emotion>[A-Z][a-z]+)/(?P<speaker>[^_/]+)_[^/]+",
    ),
    "urdu": Naming(  # from documentation; F8 is the number of a file, and no gender
        layout="speaker SM20, file F8, emotion of A H N S, number: SM20_F8_N012.wav",
        language="ur",
        clips=400,
        pattern=r"(?P<speaker>S(?P<gender>[MF])\d+)_F\d+_(?P<emotion>[A-Z])\d+",
        emotions={"A": "anger", "H": "happiness", "N": "neutral", "S": "sadness"},
        genders=_F_M,
    ),
}
