"""Measures of a trained mixture of experts.

``target`` says what such a measure is and what it is given.  ``routed`` measures quality, load and serving,
``balance_curve`` what even load costs where prices follow the text,
``quick_validation`` the model before and after compression, and ``routing_time`` how long each part of routing takes.
"""
