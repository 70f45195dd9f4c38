"""The parts of app.py that do not need Streamlit.

gallery    the pictures, and how they are shown
detectors  models from files and uploads; what they find, and how long they take
sides      which detector stands left and right of the page
clips      a short video through two models
run_views  runs with their scores, curves and maps
diagram    how a run was trained, as a drawing
texts      the page's longer texts, and its style sheet
"""
