"""Programs that hang, each for another reason. A report has to name the culprit."""
