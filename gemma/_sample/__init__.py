"""How prompts are continued.

A row is a list of known tokens, of which the model has read the first so many:

    tokens   BOS  t1  t2  t3  t4   .   .   .   .      [B, S]
             |-- read --|      |
             |----- known -----|                ends

A prompt is known from the start.  All of it but its last token is read in
chunks, which are a few compiled sizes (`read`).  From then on one token is
known that has not been read: a step reads it, and draws the token after it
(`run`).  The steps run on the device, many in one call, until every row has
drawn a stop token or has no more room.

A row that has ended is free, and the next prompt takes it.  So there may be
many more prompts than rows.  Which row a prompt is in, and beside which others,
changes nothing: rows do not see each other, and a prompt's random numbers are
made from its seed and from how many tokens it has drawn.

With speculation a step reads some guessed tokens behind the known one, and
draws after each of them as if it were known.  The guess is kept so far as it is
what was drawn.

Read in this order:

    settings.py   what a call asks for
    loop.py       the rows on the device: State, admit, read, run
    draw.py       one token from logits: penalties, bias, temperature, cut
    cut.py        the likeliest tokens, found without a sort
    lookup.py     the guesses of speculation
    text.py       a row's text on the host: Completion
    sampler.py    Sampler, which puts prompts into rows
"""
