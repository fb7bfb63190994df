"""One file a benchmark: its prompt, its parser, its official scorer. Nothing here knows a model, jax or torch.

A benchmark module (gqa, scienceqa, blink, vstar, mmvp, vsp) declares

    SCORERS         the protocols it knows: `official`, and `lmms_eval` where it differs
    ORIGINAL        whose code `official` follows, and which version of it
    SPLITS          the splits that are evaluated, the usual one first
    EMBEDDED        name of the embedded world's dataset of the same form, "" for none
    PUBLISHED       {split: number of questions published}, to tell a part or another version from the whole
    MAX_NEW_TOKENS  of a reply, as the original allows; {scorer: limit} where they differ
    PROMPT          {scorer: the prompt as a template, for the record}
    check(question, images)             ValueError where the official fields are not what they should be
    cluster(question, key)              what resampling must keep together, such as the image
    prompt(question, scorer)            the text after the images
    answer(question)                    the right answer in the parser's form, None where it is hidden
    parse(reply, question, scorer)      the answer that the reply gives, None where it gives none
    correct(parsed, question, scorer)   is it right?
    report(scored, scorer, seed)          {metric: Estimate} of `ScoredItem`s, in the official order

and may declare `submission(scored)`: (file name, content) in the form that the official evaluation takes; and
`check_choices(content, questions)`, a ValueError where a choices file is of other questions: `report` then takes it.
"""

VERSION = 3
"""Of the scorers, kept in every results file: raised whenever a prompt, a parser or a metric may give another value."""
