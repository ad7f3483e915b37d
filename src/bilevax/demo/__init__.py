"""The demo: tune hundreds of penalties of a logistic regression at once.

Run it with `python -m bilevax.demo`; it needs the extra `bilevax[demo]`. The modules, in the
order in which to read them:

    model     the logistic regression: an inner objective and an outer one
    tuning    the bilevel problem, solved by Adam on hypergradients, and by a grid
    study     how accurate hypergradients are at inexact solutions
    data      the data sets of scikit-learn, standardised and split
    files     the user's own data
    report    the text on the terminal and the JSON file
    figures   the PNG files
    cli       the command line
"""
