"Make README.md from nbs/index.ipynb with nbconvert; with --check, only say whether it is in step."
import re
import sys
from pathlib import Path
import nbformat
from nbconvert import MarkdownExporter

root = Path(__file__).resolve().parent.parent

def readme()->str:
    "index.ipynb as Markdown: hidden cells and directives left out."
    nb = nbformat.read(root/'nbs'/'index.ipynb', as_version=4)
    nb.cells = [c for c in nb.cells if not re.match(r'#\|\s*(hide|default_exp)', c.source)]
    nb.metadata['language_info'] = {'name': 'python'}
    for c in nb.cells:
        if c.cell_type == 'code': c.source = re.sub(r'^#\|.*\n', '', c.source, flags=re.M)
    body, _ = MarkdownExporter().from_notebook_node(nb)
    body = re.sub(r'\]\((\d\d\w+\.ipynb)\)', r'](nbs/\1)', body)      # links between notebooks, seen from the root
    body = '\n'.join(line.rstrip() for line in body.splitlines())
    body = re.sub(r'\n{3,}', '\n\n', body).strip() + '\n'
    return '<!-- Made from nbs/index.ipynb by .ci/readme.py. Edit the notebook. -->\n\n' + body

if __name__ == '__main__':
    path, text = root/'README.md', readme()
    if '--check' in sys.argv[1:]:
        if path.read_text(encoding='utf-8') != text: sys.exit('README.md is not in step with nbs/index.ipynb: run python .ci/readme.py')
    else:
        tmp = path.with_suffix('.tmp')
        tmp.write_text(text, encoding='utf-8'); tmp.replace(path)
