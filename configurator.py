"""Settings from config files and the command line, checked. Read configure, parse, load_file; the rest is types, messages and help.

A script has its settings at its top, as `learning_rate = 1e-3 # peak rate`, and below them `given = configure(globals(), GPTConfig)`.
A setting is declared by that one line: its name, its default, its type (the default's) and its text in --help (the comment).

    python train.py config/small.py --learning_rate=3e-4 --compile --no-bias      # in the order written, later wins"""
import os, signal, sys # before all others: from here on Ctrl-C ends in one line

# How long torch's threads spin for work before they sleep; unset, 300,000 times. Two runs of two threads on two
# cores then hinder each other more than they compute. Read when torch is loaded, so it stands here.
if 'OMP_WAIT_POLICY' not in os.environ: os.environ.setdefault('GOMP_SPINCOUNT', '5000')

def stop_at_once(*_):
    """Ctrl-C while torch is imported, where an exception would be fifty lines and some imports swallow it."""
    os.write(2, b'stopped\n')
    os._exit(130)

# only in a script that calls configure, which makes Ctrl-C an exception again, and if Ctrl-C is not ignored
_script = getattr(sys.modules['__main__'], '__file__', None) or '' # a notebook has none
if os.path.isfile(_script) and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    with open(_script, 'rb') as _file:
        if b'configure(globals()' in _file.read(): signal.signal(signal.SIGINT, stop_at_once)

import ast, contextlib, dataclasses, difflib, errno, glob, inspect, json, linecache, re, runpy, subprocess
import textwrap, traceback, types

SIMPLE = (bool, int, float, str, tuple) # what a setting can be; anything else in a script is not one
KIND = {bool: 'true or false', int: 'an int', float: 'a float, not nan', str: 'a str', tuple: 'a tuple, as in (2, 4, 8)'}
WORDS = {'true': True, '1': True, 'yes': True, 'on': True, 'false': False, '0': False, 'no': False, 'off': False}

# what people type who come from other programs; said where the script has the setting on the left
SYNONYMS = {
    'learning_rate': 'lr max_lr peak_lr', 'weight_decay': 'wd', 'beta1': 'betas', 'beta2': 'betas',
    'grad_clip': 'clip max_grad_norm clip_grad_norm', 'warmup_iters': 'warmup warmup_steps num_warmup_steps',
    'max_iters': 'epochs n_epochs num_epochs iters num_iters steps n_steps num_steps max_steps train_steps',
    'batch_size': 'bs micro_batch_size', 'gradient_accumulation_steps': 'grad_accum grad_accum_steps',
    'block_size': 'seq_len seq_length sequence_length context context_length ctx n_ctx max_seq_len',
    'n_embd': 'd_model dim n_embed embed_dim hidden_size hidden_dim width', 'mlp_hidden': 'd_ff',
    'n_head': 'n_heads num_heads', 'n_kv_head': 'n_kv_heads', 'n_layer': 'n_layers num_layers depth',
    'temperature': 'temp', 'max_new_tokens': 'max_tokens num_tokens n_tokens length', 'num_samples': 'n',
    'start': 'prompt', 'sample_prompt': 'prompt', 'out_dir': 'out output output_dir', 'dataset': 'data'}

class Given(dict):
    """{name: value} of all that was given. typed: the names that the command line gave, not only a file."""
    typed = frozenset()

class UserError(ValueError):
    """A message for a person: at most three lines, with the way out. Uncaught, it ends the process with exit code 2 and no traceback."""

def configure(namespace, schema=None, argv=None, guest_of=None):
    """Override the settings in namespace (a script's globals()) from argv; return {name: value} of all given.
    Fields of the dataclass schema are accepted too and returned, but never put into namespace. guest_of:
    another script whose config files this one reads as well. Its settings are checked and left out, aloud if
    typed; a typed --out_dir stands for the model of the run there. Raises UserError; --help exits."""
    sys.excepthook = report
    if signal.getsignal(signal.SIGINT) is stop_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # None is a closed stream. Lines are written at once, so that a failure is met here and not at the exit
    sys.stdout, sys.stderr = sys.stdout or open(os.devnull, 'w'), sys.stderr or open(os.devnull, 'w')
    for stream in (sys.stdout, sys.stderr): # under an ASCII locale one accented letter in a sample would end the run
        if hasattr(stream, 'reconfigure'):
            stream.reconfigure(encoding='utf-8', errors='replace', line_buffering=True)
    argv = sys.argv[1:] if argv is None else argv
    settings = simple(namespace)
    fields = {f.name: f.default for f in (dataclasses.fields(schema) if schema else ()) if type(f.default) in SIMPLE}
    known = {**settings, **fields, **settings} # the script's names first, and its default where both have the name
    if '--help' in argv or '-h' in argv: show_help(namespace, schema, known)
    given = parse(argv, {**(top_level(guest_of) if guest_of else {}), **known})
    for name, value in given.items(): given[name] = at_home(name, value)
    if guest_of: given = of_run(given, known)
    guest = os.path.basename(guest_of or '')
    for name in sorted(given.keys() - known.keys()):
        if name in given.typed: print(f'{name} has no effect here: it is of {guest}', file=sys.stderr)
        del given[name]
    namespace.update({name: value for name, value in given.items() if name in settings}) # only now: an error changes nothing
    for name, value in given.items(): # on stderr, because stdout may go into a file: sample.py > story.txt
        print(f'{name} = {value!r}    (default {known[name]!r})', file=sys.stderr)
    return given

def simple(names):
    """Those of {name: value} that are settings. NAMES in capitals are constants, _names are private."""
    return {name: value for name, value in names.items()
            if not name.startswith('_') and not name.isupper() and type(value) in SIMPLE}

def top_level(path):
    """{name: default} of the settings at the top of a script that is not run."""
    found = {}
    with open(path, encoding='utf-8') as file: body = ast.parse(file.read()).body
    for node in body:
        with contextlib.suppress(ValueError): # not a literal, so not a setting
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                found[node.targets[0].id] = ast.literal_eval(node.value)
    return simple(found)

def of_run(given, known):
    """given; or, if --out_dir was typed, the model in that run's run.json and, above it, all else typed."""
    folder = given.pop('out_dir', '') # in a config file it is where train.py will write
    if 'out_dir' not in given.typed: return given
    if 'model_size' in given.typed: raise UserError('out_dir and model_size both choose a model; drop one')
    path = os.path.join(folder, 'run.json')
    try:
        with open(path, encoding='utf-8') as file: saved = dict(json.load(file)['config']['model'])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f'cannot read {path}\nGive the folder of a run, or drop --out_dir') from error
    run = Given()
    for name, value in saved.items():
        if name not in known: raise unknown(name, known, path, 'Use the commit that this file names.')
        value = checked(fit, name, value, known[name], path)
        if value != known[name] or name == 'vocab_size': run[name] = value # the rest is as by default
    run.update({name: given[name] for name in given.typed & given.keys()})
    run.typed = given.typed - {'out_dir'}
    return run

def parse(argv, known):
    """The Given of all config files and flags."""
    given, queue = Given(), list(argv)
    while queue:
        arg = queue.pop(0)
        if not arg.startswith('-'): given.update(load_file(arg, known))
        elif not arg.startswith('--'): raise UserError(f'{brief(arg)}: a setting takes two dashes, as in -{arg}')
        else:
            name, value = parse_flag(arg, queue, known)
            given[name], given.typed = value, given.typed | {name}
    return given

def parse_flag(arg, queue, known):
    """(name, value) of one --argument; its value comes off the queue if it is the next argument."""
    key, equals, text = arg[2:].partition('=') # at the first '=': --start=a=b is the text a=b
    name = key.replace('-', '_')
    positive = name.removeprefix('no_')
    if not equals and name not in known and type(known.get(positive)) is bool: return positive, False
    if not equals and name not in known and known.get(positive) == 'auto': return positive, 'false'
    if name not in known: raise unknown(name, known, 'command line', '--help lists all.')
    if not equals and known[name] == 'auto' and (not queue or queue[0].startswith('--')): return name, 'true' # auto | true | false
    if not equals and type(known[name]) is bool:
        # without this `--compile false` would switch compile on and then look for a config file called false
        if queue and queue[0].lower() in WORDS: raise UserError(f'--{key} {queue[0]}: write --{key}={queue[0]}')
        return name, True
    if not equals and (not queue or queue[0].startswith('--')): raise UserError(f'--{key} needs a value, as in --{key}={known[name]!r}')
    return name, checked(from_text, name, text if equals else queue.pop(0), known[name], 'command line')

def load_file(path, known):
    """{name: value} of a config file. It runs apart from the script: nothing in it gets out but what is returned here."""
    if not os.path.isfile(path): raise missing(path)
    if is_program(path): raise UserError(f'{path} is a program; a config file only gives values to settings')
    try: bound = runpy.run_path(path)
    except (Exception, SystemExit) as error: raise broken(path, error) from error
    given = {}
    for name, value in bound.items():
        if name.startswith('_') or callable(value) or isinstance(value, types.ModuleType): continue # scratch, def, class, import
        if name in known: given[name] = checked(fit, name, value, known[name], where(path, name))
        elif isinstance(value, (*SIMPLE, list)): # most likely a setting misspelt: accepted in silence it costs a run
            raise unknown(name, known, where(path, name), f'A scratch variable needs an underscore: _{name}')
    if not given: print(f'{path} sets nothing', file=sys.stderr)
    return given

def is_program(path):
    """Whether the file is a script such as train.py, by names that only scripts use: read, it would run."""
    with contextlib.suppress(Exception), open(path, 'rb') as file: # no Python: reported when it is run
        names = {node.id for node in ast.walk(ast.parse(file.read())) if isinstance(node, ast.Name)}
        return not names.isdisjoint({'configure', '__name__'})

# what stands before a path in the settings that are paths: nothing, a comma in a list, FILE:
PATHS = {**dict.fromkeys(('out_dir', 'data_dir', 'dataset', 'offline_dataset', 'tokenizer', 'nanogpt'), '^'),
         'update_hooks': '^|, *', 'forward_hooks': '^|, *', 'start': '^FILE:'}

def at_home(name, value):
    """value, the leading ~ of a path replaced by the home folder: no shell does that in --out_dir=~/run."""
    if name not in PATHS or type(value) is not str: return value
    return re.sub(f'({PATHS[name]})(~[^/,]*)', lambda found: found[1] + os.path.expanduser(found[2]), value)

# --- types: the default decides ---

def checked(convert, name, value, default, origin):
    """convert(value, default), or the UserError that says what would have fitted."""
    try: return convert(value, default)
    except (ValueError, TypeError, LookupError, OverflowError, SyntaxError, RecursionError, MemoryError): # last three: literal_eval
        raise UserError(f'{name} = {brief(value)} ({origin}): must be {KIND[type(default)]}. The default is {brief(default)}.') from None

def fit(value, default):
    """value in the type of default, or a ValueError. Strict (True is no int), but for int -> float and list -> tuple."""
    if type(value) is list: value = tuple(value)
    if type(default) is float and type(value) is int: value = float(value)
    if default == 'auto' and type(value) is bool: value = str(value).lower() # compile = False, as nanoGPT's config files have it
    if type(value) is not type(default) or value != value: raise ValueError(value) # only nan differs from itself
    alike = type(default) is tuple and len({type(item) for item in default}) == 1 # the default () says nothing about items
    return tuple(fit(item, default[0]) for item in value) if alike else value

def from_text(text, default):
    """What was typed in a shell in the type of default, or an error that checked knows. Any text is a str: 2024, a=b, nothing at all."""
    if type(default) is str: return text
    if type(default) is bool: return WORDS[text.lower()]
    if type(default) is float: return fit(float(text), default)
    if type(default) is tuple:
        value = ast.literal_eval(text.strip() or '()')
        return fit(value if isinstance(value, (tuple, list)) else (value,), default) # --depths=2 is one depth
    value = float(text) if set(text) & set('.eE') else int(text) # not float alone: it would round a long seed
    return int(value) if value == int(value) else fit(value, default) # 1e4 is an int, 1.5 is refused

# --- messages ---

def brief(value):
    """repr cut to a length that leaves room for the rest of the message."""
    return text if len(text := repr(value)) <= 60 else text[:57] + '...'

def unknown(asked, known, origin, hint):
    near = [name for name, words in SYNONYMS.items() if name in known and asked.lower() in words.split()]
    near = near or difflib.get_close_matches(asked, known, n=3, cutoff=0) # cutoff 0: always name something
    return UserError(f'unknown setting {brief(asked)} ({origin})\nNearest: {", ".join(near)}. {hint}')

def missing(path):
    """The error for a config file that is not there: names the files that are, the most similar first."""
    folders = [os.path.dirname(path)] if os.path.dirname(path) else ['config', '.']
    paths = [os.path.normpath(p) for folder in folders for p in sorted(glob.glob(os.path.join(glob.escape(folder), '*.py')))]
    by_name = {os.path.basename(p).removesuffix('.py'): p for p in reversed(paths)} # reversed: config/x.py before ./x.py
    near = [by_name[name] for name in difflib.get_close_matches(os.path.basename(path).removesuffix('.py'), by_name)] or paths[:8]
    hint = f'A setting takes two dashes: --{path}' if '=' in path else f'There is: {", ".join(near) or "no .py file in that folder"}'
    return UserError(f'no config file {path!r}\n{hint}')

def broken(path, error):
    """The error for a config file that raises. The line is the one in that file, not in a module that it called."""
    rows = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    if isinstance(error, SyntaxError) and error.filename == path: rows.append(error.lineno)
    text = ' '.join(str(getattr(error, 'msg', error)).split()) # a SyntaxError's str repeats file and line
    return UserError(f'{path}{f":{rows[-1]}" if rows else ""}: {type(error).__name__}: {text[:200]}\nA config file is ordinary Python.')

def where(path, name):
    """'file:line' of the last assignment to name; just the file if the name came in another way."""
    with open(path, 'rb') as file: rows = [node.lineno for node in stored(ast.parse(file.read())) if node.id == name]
    return f'{path}:{max(rows)}' if rows else path

def stored(tree):
    """The nodes of all names that are assigned to anywhere in tree."""
    return [node for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]

def report(kind, error, trace):
    """sys.excepthook: one line for what a person did or the machine lacks; a bug keeps its traceback."""
    gone, full = issubclass(kind, BrokenPipeError), getattr(error, 'errno', None) == errno.ENOSPC
    if gone or full: os.dup2(os.open(os.devnull, os.O_WRONLY), 1) # else its last flush fails too
    if gone: raise SystemExit(141) # `| head` has read enough
    if issubclass(kind, KeyboardInterrupt):
        with contextlib.suppress(OSError): # if the same Ctrl-C has ended the tee that reads this
            os.write(2, b'\n' * sys.stderr.isatty() + b'stopped\n') # a terminal has ^C on this line already
        raise SystemExit(130)
    memory = 'MemoryError' in kind.__name__ or "can't allocate memory" in str(error) # the last: torch, CPU
    if not (issubclass(kind, UserError) or full or memory): return sys.__excepthook__(kind, error, trace)
    if memory: error = f'not enough memory: {str(error)[:200]}\nMake the model, the batch or the text smaller'
    print('error: ' + '\n'.join(str(error).splitlines()[:3]), file=sys.stderr)
    raise SystemExit(2) # Python takes the exit code of a SystemExit that leaves the hook

@contextlib.contextmanager
def user_errors():
    """Turn a ValueError or a file that cannot be opened into a UserError. For code that checks input; around a loop it would hide bugs."""
    try: yield
    except (UserError, BrokenPipeError): raise # the second is a reader that has gone: see report
    except OSError as error:
        raise UserError(f'cannot open {error.filename}: {error.strerror}' if error.filename else str(error)) from error
    except ValueError as error: raise UserError(str(error)) from error

def git_commit():
    """The commit of these files, for the record of a run; 'unknown' without git or outside a checkout."""
    describe = ['git', 'describe', '--always', '--dirty', '--abbrev=40', '--exclude=*'] # the hash, and -dirty where files differ from it
    try: done = subprocess.run(describe, cwd=os.path.dirname(os.path.abspath(__file__)), capture_output=True, text=True)
    except OSError: return 'unknown' # no git on this machine
    return done.stdout.strip() or 'unknown'

# --- help: from the comments in the source, so that they are written once ---

def show_help(namespace, schema, known):
    """Print every setting with default and comment, and exit with 0."""
    script = namespace.get('__file__', '')
    print(f'usage: python {os.path.basename(script) or "script.py"} [config/file.py ...] [--name=value ...]\n'
          'A true/false setting is also --name or --no-name. In the order written, later wins.')
    source = ''.join(linecache.getlines(script)) # of no file, nothing: then help is without comments
    body = ast.parse(source).body
    body += [inner for node in body if isinstance(node, ast.If) for inner in node.body] # under the main guard
    texts = comments(source, body, '')
    with contextlib.suppress(OSError, TypeError): # no schema, or one typed into a session: no source either
        source = textwrap.dedent(inspect.getsource(schema))
        texts = {**comments(source, ast.parse(source).body[0].body, f'{schema.__name__}: '), **texts}
    last = None
    for name, default in known.items():
        heading, text = texts.get(name, ('', ''))
        if heading != last: print(f'\n{heading}'.rstrip(' :\n')) # only a blank line where there is no heading
        left, last = f'  --{name}={brief(default)}', heading
        print(textwrap.fill(text, 110, initial_indent=f'{left:<35} ', subsequent_indent=' ' * 36) or left)
    raise SystemExit(0)

def comments(source, body, title):
    """{name: (heading, comment)} of all assignments in body: the comment at its end, else the comment lines that touch it from above.
    `# --- data ---`, or one comment line above a setting that has its own as well, is the heading of all that follow."""
    lines, found, heading, block = source.split('\n'), {}, '', []
    nodes = {node.lineno: node for node in body if isinstance(node, (ast.Assign, ast.AnnAssign))}
    for row, line in enumerate(map(str.strip, lines), start=1):
        if row in nodes:
            node = nodes[row]
            own = lines[node.end_lineno - 1].encode()[node.end_col_offset:].decode().strip('# ') # ast counts columns in bytes
            if own and len(block) == 1: heading = block[0]
            for name in stored(node): found.setdefault(name.id, (title + heading, own or ' '.join(block))) # the first is the setting
        ruled = re.match(r'#\s*[-=]{2}', line)
        if ruled: heading = line.strip('#-= ') or heading # a bare ----- only separates
        block = [*block, line.strip('# ')] if line.startswith('#') and not ruled else []
    return found
