"""What the command line and the demo share: words for messages, options, files, figures.

Not imported by the library itself: `axes` needs Matplotlib.
"""
