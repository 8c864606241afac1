// Draws what pixcon.explore computed, from numbers that travelled once: no kernel is asked while one points.
// Used twice: anywidget calls `render`, and a page without a kernel calls `mount`, which gives the same kind of model.

const css = `
:host { display: block }
* { box-sizing: border-box }
[hidden] { display: none !important }
.root { container-type: inline-size; font-size: 14px; line-height: 1.4; color: inherit; max-width: 1100px; padding: 2px;
        --line: color-mix(in srgb, currentColor 28%, transparent);
  --soft: color-mix(in srgb, currentColor 9%, transparent) }
.bar { display: flex; flex-wrap: wrap; gap: 6px 16px; align-items: center; margin: 0 0 10px }
.group { display: flex; align-items: center; gap: 4px; flex-wrap: wrap }
.name { opacity: .75; margin-right: 2px }
button { font: inherit; color: inherit; background: transparent; border: 1px solid var(--line);
  border-radius: 5px;
                 padding: 3px 9px; min-height: 30px; cursor: pointer }
button:hover { background: var(--soft) }
button[aria-pressed=true] { background: var(--on); border-color: var(--on); color: #fff; font-weight: 600;
                              print-color-adjust: exact; -webkit-print-color-adjust: exact }
button:focus-visible, input:focus-visible, .view:focus-visible { outline: 3px solid var(--on); outline-offset: 2px }
input[type=range] { width: 96px; accent-color: var(--on) }
.slider output { min-width: 2.4em; font-variant-numeric: tabular-nums }
.strip button { padding: 2px; line-height: 0; border-width: 2px }
.strip button[aria-pressed=true] { background: transparent }
.strip img { width: 56px; height: 42px; object-fit: cover; border-radius: 2px }
.body { display: grid; grid-template-columns: minmax(0, 1fr) minmax(250px, 300px); gap: 8px 24px;
  align-items: start }
.body.gallery { grid-template-columns: minmax(200px, 300px) minmax(0, 1fr) }
.stage { position: relative; margin-top: 24px }
.view { position: absolute; touch-action: pan-y; border-radius: 3px }
.view.query { cursor: crosshair }
.view img, .view canvas { position: absolute; inset: 0; width: 100%; height: 100%; display: block;
  border-radius: 3px }
.view img { user-select: none; -webkit-user-drag: none }
.view canvas { image-rendering: pixelated; opacity: .6; pointer-events: none }
.tag { position: absolute; bottom: 100%; left: 0; white-space: nowrap; color: #fff; font-size: 12px;
  line-height: 18px; padding: 0 7px;
       border-radius: 3px 3px 0 0; pointer-events: none; print-color-adjust: exact;
  -webkit-print-color-adjust: exact }
.query .tag { background: var(--query); color: #111 } .key .tag { background: var(--key) }
.view.query { box-shadow: 0 0 0 2px var(--query) } .view.key { box-shadow: 0 0 0 2px var(--key) }
svg.over { position: absolute; inset: 0; width: 100%; height: 100%; overflow: visible; pointer-events: none }
.bars { display: grid; gap: 2px 14%; margin: 12px 0 4px; font-size: 12px; font-variant-numeric: tabular-nums }
.scale { position: relative; height: 12px; border-radius: 2px; print-color-adjust: exact;
  -webkit-print-color-adjust: exact }
.scale i { position: absolute; top: -3px; bottom: -3px; width: 0; border-left: 2px solid currentColor }
.ends { display: flex; justify-content: space-between; gap: 6px }
.under { display: flex; flex-wrap: wrap; gap: 4px 8px; align-items: center; margin-top: 4px }
.under button { padding: 0 7px; min-height: 26px; font-size: 12px }
.maps { display: flex; flex-wrap: wrap; gap: 8px; margin-top: 10px }
.maps:not(:has(> :nth-child(2))) { display: none }
.maps button { padding: 3px; border-width: 2px; font-size: 12px; line-height: 16px; width: min(31%, 128px);
  overflow: hidden; text-overflow: ellipsis }
.maps button[aria-pressed=true] { background: transparent; color: inherit }
.maps div { position: relative; margin-bottom: 2px }
.maps img { width: 100%; display: block; border-radius: 2px }
.maps canvas { position: absolute; inset: 0; width: 100%; height: 100%; image-rendering: pixelated;
  opacity: .6; border-radius: 2px }
.legend { display: flex; flex-wrap: wrap; gap: 2px 14px; font-size: 12px; margin-top: 8px }
.legend svg { width: 15px; height: 15px; vertical-align: -3px; margin-right: 4px; overflow: visible }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; margin: 0 0 8px }
th { font-weight: 400; text-align: left; opacity: .75; padding: 2px 8px 2px 0; vertical-align: top;
  white-space: nowrap }
td { padding: 2px 0; text-align: right } td b { font-weight: 650 }
tr + tr > * { border-top: 1px solid var(--soft) }
h4 { font-size: 13px; margin: 0; font-weight: 650 }
.head { display: flex; flex-wrap: wrap; justify-content: space-between; align-items: center; gap: 2px 10px;
  margin: 12px 0 4px }
.note { font-size: 12px; opacity: .75; margin: 4px 0 }
.logit { display: grid; grid-template-columns: 5.6em 1fr 2.8em 4em; gap: 6px; align-items: center;
  font-size: 12px; font-variant-numeric: tabular-nums }
.logit > :nth-child(n+3) { text-align: right }
.logit i { display: block; height: 11px; min-width: 1px; border-radius: 2px; print-color-adjust: exact;
  -webkit-print-color-adjust: exact }
.pins { overflow-x: auto } .pins th, .pins td { text-align: right; white-space: nowrap;
  padding: 2px 10px 2px 0 }
.pins th:first-child, .pins td:first-child { text-align: left }
.dot { display: inline-block; width: 11px; height: 11px; border-radius: 50%; margin-right: 6px;
  vertical-align: -1px;
       print-color-adjust: exact; -webkit-print-color-adjust: exact }
.tiles { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 10px; margin-top: 24px }
.tile { font-size: 12px; font-variant-numeric: tabular-nums } .tile div { position: relative }
.tile img { width: 100%; display: block; border-radius: 3px }
.sr { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%) }
@container (min-width: 560px) and (max-width: 759px) { .side { display: grid;
  grid-template-columns: 1fr 1fr; gap: 0 24px } .head { margin-top: 0 } }
@container (max-width: 759px) { .body, .body.gallery { grid-template-columns: minmax(0, 1fr) }
  .tiles { margin-top: 0 } }
@container (max-width: 559px) { .gallery .stage { max-width: 270px } }
@container (min-width: 560px) and (max-width: 759px) { .body.gallery { grid-template-columns: 220px minmax(0, 1fr) } }
@container (max-width: 459px) { .tiles { grid-template-columns: repeat(3, minmax(0, 1fr)) }
  .bar { gap: 6px 10px } button { min-height: 36px } }
@media (pointer: coarse) { .keys { display: none } }
@media print { .root { max-width: none } .help, .under, .doing, input { display: none }
  .body { break-inside: avoid } }
`

// ---- small tools ----

const SVG = 'http://www.w3.org/2000/svg'

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith('on')) element.addEventListener(name.slice(2), value)
    else if (value === true) element.setAttribute(name, '')
    else if (value !== false && value != null) element.setAttribute(name, value)
  }
  element.append(...children.flat().filter(child => child != null))
  return element
}

const node = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children)

const draw = (tag, attributes = {}, ...children) => fill(document.createElementNS(SVG, tag), attributes, children)

/** A number with its digits, a true minus sign and no "-0.00". */
function text(x, digits = 3) {
  if (x == null || Number.isNaN(x)) return '–'
  return x.toFixed(digits).replace(/^-(0\.?0*)$/, '$1').replace('-', '−')
}

const kinds = { u1: Uint8Array, i2: Int16Array, f4: Float32Array }

/** A function that takes one array out of the bytes of all. */
function arrays(view) {
  const bytes = new Uint8Array(view.buffer, view.byteOffset, view.byteLength).slice()    // aligned for floats
  return ({ at, kind, n }) => new kinds[kind](bytes.buffer, at, n)
}

function dataUrl(bytes) {
  let characters = ''
  for (let i = 0; i < bytes.length; i += 8192) characters += String.fromCharCode(...bytes.subarray(i, i + 8192))
  return 'data:image/webp;base64,' + btoa(characters)
}

/** Values (h*w) as colours on a canvas of h x w pixels; nothing where there is no value. */
function paint(canvas, values, [h, w], low, high, map) {
  canvas.width = w
  canvas.height = h
  const context = canvas.getContext('2d')
  const pixels = context.createImageData(w, h)
  for (let i = 0; i < h*w; i++) {
    const fraction = (values(i) - low)/Math.max(high - low, 1e-12)
    const c = 3*Math.round(255*Math.min(Math.max(fraction, 0), 1))
    pixels.data.set([map[c], map[c + 1], map[c + 2], 255], 4*i)
  }
  context.putImageData(pixels, 0, 0)
}

function gradient(map) {
  const stops = Array.from({ length: 17 }, (_, i) => Math.min(16*i, 255)*3)
  return `linear-gradient(90deg, ${stops.map(c => `rgb(${map[c]},${map[c + 1]},${map[c + 2]})`)})`
}

/** The outline of the cells that are inside, as an SVG path in cells. */
function outline(inside, [h, w]) {
  const on = (r, c) => r >= 0 && c >= 0 && r < h && c < w && inside[r*w + c] === 1
  let path = ''
  for (let r = 0; r <= h; r++) {
    for (let c = 0; c <= w; c++) {
      if (on(r, c) !== on(r - 1, c)) path += `M${c} ${r}h1`
      if (on(r, c) !== on(r, c - 1)) path += `M${c} ${r}v1`
    }
  }
  return path
}

// ---- shapes on the views, each with a white halo so that it shows on any ground ----

/** Attributes of a line that is as thick on a large view as on a small one. */
const thin = more => ({ fill: 'none', 'vector-effect': 'non-scaling-stroke', 'stroke-linejoin': 'round', ...more })

function haloed(tag, where, colour, filled) {
  const shape = more => draw(tag, thin({ ...where, ...more }))
  return draw('g', {}, shape({ stroke: '#fff', 'stroke-width': 5.5 }),
              shape({ stroke: '#000', 'stroke-width': 4, 'stroke-opacity': .35 }),
              shape({ stroke: colour, 'stroke-width': 2.8, fill: filled ? colour : 'none', 'fill-opacity': .85 }))
}

const square = (x, y, colour) => haloed('rect', { x, y, width: 1, height: 1 }, colour)

const circle = (x, y, r, colour, filled) => haloed('circle', { cx: x + .5, cy: y + .5, r }, colour, filled)

function diamond(x, y, r, colour, filled) {
  const s = 1.3*r
  return haloed('path', { d: `M${x + .5} ${y + .5 - s}l${s} ${s} ${-s} ${s} ${-s} ${-s}z` }, colour, filled)
}

function cross(x, y, r, colour) {
  const [left, right, top] = [x + .5 - r, x + .5 + r, y + .5 - r]
  return haloed('path', { d: `M${left} ${top}l${2*r} ${2*r}M${right} ${top}l${-2*r} ${2*r}` }, colour)
}

const dot = (cx, cy, fill, r) => draw('circle', thin({ cx, cy, r, fill, stroke: '#fff', 'stroke-width': 1.5 }))

// ---- what both explorers have ----

/** State that both sides know: the widget's Python object, or nobody in a page. */
function shared(model, start, redraw) {
  const state = { ...start, ...model.get('state') }
  let own = false                                                  // whether the change comes from here
  const heard = () => { if (!own) { Object.assign(state, model.get('state')); redraw() } }
  model.on('change:state', heard)
  return {
    state,
    change(values) {
      own = true
      model.set('state', { ...Object.assign(state, values) })
      model.save_changes()
      own = false
      redraw()
    },
    stop: () => model.off('change:state', heard),
  }
}

function choice(name, options, chosen, choose) {
  const buttons = options.map((option, i) => node('button', { type: 'button', onclick: () => choose(i) }, option))
  const group = node('span', { class: 'group', role: 'group', 'aria-label': name, hidden: options.length < 2 },
                     node('span', { class: 'name' }, name), buttons)
  return [group, () => buttons.forEach((button, i) => button.setAttribute('aria-pressed', i === chosen()))]
}

function slider(name, title, steps, chosen, choose) {
  const input = node('input', { type: 'range', min: 0, max: steps.length - 1, step: 1, 'aria-label': title, title,
                                oninput: e => choose(steps[+e.target.value]) })
  const shown = node('output')
  const label = node('label', { class: 'group slider' }, node('span', { class: 'name' }, name), input, shown)
  return [label, () => {
    input.value = steps.indexOf(chosen())
    input.setAttribute('aria-valuetext', shown.textContent = String(+chosen().toFixed(3)))
  }]
}

function strip(images, sources, chosen, choose) {
  const buttons = images.map((image, i) =>
    node('button', { type: 'button', title: image.name, 'aria-label': image.name, onclick: () => choose(i) },
         node('img', { src: sources[i], alt: '' })))
  return [node('div', { class: 'bar strip', role: 'group', 'aria-label': 'image' }, images.length > 1 ? buttons : []),
          () => buttons.forEach((button, i) => button.setAttribute('aria-pressed', i === chosen()))]
}

function makeView(role) {
  const image = node('img', { alt: '', draggable: 'false' })
  const heat = node('canvas')
  const tag = node('span', { class: 'tag' })
  return { box: node('div', { class: `view ${role}` }, image, heat, tag), image, heat, tag }
}

/** Calls back with the cell under mouse, finger or pen. */
function pointed(box, grid, point, pick, leave) {
  const cell = event => {
    const { left, top, width, height } = box.getBoundingClientRect()
    const [h, w] = grid()
    const within = (x, n) => Math.min(Math.max(Math.floor(x*n), 0), n - 1)
    return within((event.clientY - top)/height, h)*w + within((event.clientX - left)/width, w)
  }
  box.addEventListener('pointermove', event => point(cell(event)))
  box.addEventListener('pointerdown', event => pick(cell(event), event.pointerType !== 'mouse'))
  if (leave) box.addEventListener('pointerleave', leave)
}

/** Arrow keys move over the cells; other keys are looked up. */
function steered(box, grid, now, move, keys) {
  box.tabIndex = 0
  box.setAttribute('role', 'application')
  box.addEventListener('keydown', event => {
    const [h, w] = grid()
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key]
    if (event.altKey || event.ctrlKey || event.metaKey || !(step || keys[event.key])) return
    event.preventDefault()
    event.stopPropagation()                                        // a notebook has shortcuts of its own
    if (!step) return keys[event.key]()
    const row = Math.min(Math.max(Math.floor(now()/w) + step[0], 0), h - 1)
    const column = Math.min(Math.max(now() % w + step[1], 0), w - 1)
    move(row*w + column)
  })
}

// ---- two views ----

function pairs(model, root) {
  const about = model.get('about')
  const take = arrays(model.get('data'))
  const map = take(about.map)
  const { colours } = about
  const sources = about.images.map(image => image.views.map(view => dataUrl(take(view))))
  const { state, change, stop } = shared(model, about.start, () => show())
  let here = null                                                  // the key cell under the pointer
  let stacked = false

  const image = () => about.images[state.image]
  const grid = () => image().grid
  const cells = () => grid()[0]*grid()[1]
  const network = () => image().networks[state.network]
  const view = () => state.swapped ? 1 : 0                         // the view that is the query
  const place = cell => `${Math.floor(cell/grid()[1]) + 1}, ${cell % grid()[1] + 1}`
  const method = () => about.methods[state.method]

  /** Which of the two matrices holds a direction: of a backbone alone the other one is its transpose. */
  const held = from => from.similar[view()] ? view() : 1 - view()

  /** Cosines of a query cell with all key cells, under a network. */
  function rowOf(cell, from) {
    const v = held(from)
    const bytes = take(from.similar[v])
    const [begin, step] = v === view() ? [cell*cells(), 1] : [cell, cells()]
    const span = from.high[v] - from.low[v]
    return Float32Array.from({ length: cells() }, (_, key) => from.low[v] + span*bytes[begin + key*step]/255)
  }

  /** Weight of each query cell in the dense loss, as pixcon.reweight has it. */
  function weights() {
    const cosine = take(network().cosine[view()])
    const spatial = take(image().spatial[view()])
    const inside = image().inside && take(image().inside[view()])
    if (method() === 'Coord') return Float32Array.from(spatial, key => key >= 0 ? 1 : 0)
    if (method() === 'Sim') return new Float32Array(cells()).fill(1)
    if (!inside) return cosine.map(s => Math.max(s, 0)**state.gamma)
    const low = Math.min(...cosine)
    const high = Math.max(...cosine.filter((_, i) => !inside[i]))
    const span = high - low
    return cosine.map((s, i) => inside[i] ? 1 : span > 0 ? Math.min(Math.max((s - low)/span, 0), 1)**state.gamma : 0)
  }

  /** Everything that is said of a query cell. */
  function numbers(cell, weight) {
    const best = take(network().best[view()])[cell]
    const spatial = take(image().spatial[view()])[cell]
    const truth = image().truth ? take(image().truth[view()])[cell] : null
    const right = truth ?? spatial
    const [row, column] = [a => Math.floor(a/grid()[1]), a => a % grid()[1]]
    return { best, spatial, truth,
             cosine: take(network().cosine[view()])[cell],
             positive: method() === 'Coord' ? spatial : best,
             inside: image().inside && take(image().inside[view()])[cell],
             off: right >= 0 ? Math.hypot(row(best) - row(right), column(best) - column(right)) : null,
             weight: weight[cell] }
  }

  /** Logits of the dense loss for a query cell at the chosen temperature. */
  function logits(cell, { positive }) {
    const dense = network().dense && network().dense[view()]
    if (!dense || positive < 0) return null
    const { n, hard, log_sum } = dense
    const taus = about.taus.length
    const nearest = take(method() === 'Coord' ? dense.spatial : dense.best)[cell]/state.tau
    const hardest = Array.from(take(hard).subarray(cell*dense.most, (cell + 1)*dense.most), c => c/state.tau)
    const others = take(log_sum)[cell*taus + about.taus.indexOf(state.tau)]
    const loss = Math.log1p(Math.exp(others - nearest))            // -log of the softmax at the positive
    const part = logit => Math.exp(logit - nearest - loss)
    const rest = Math.max(1 - [nearest, ...hardest].reduce((sum, logit) => sum + part(logit), 0), 0)
    return { n, nearest, hardest, loss, part, rest }
  }

  // what is built once
  const query = makeView('query')
  const key = makeView('key')
  const over = draw('svg', { class: 'over' })
  const stage = node('div', { class: 'stage' }, query.box, key.box, over)
  const bars = node('div', { class: 'bars' })
  const maps = node('div', { class: 'maps', role: 'group', 'aria-label': 'this cell under each network' })
  const legend = node('div', { class: 'legend' })
  const table = node('div')
  const losses = node('div')
  const pinned = node('div', { class: 'pins' })
  const spoken = node('div', { class: 'sr', 'aria-live': 'polite' })
  const [images, networks, methods, gamma, tau, overlay, range] = [
    strip(about.images, sources.map(s => s[0]), () => state.image,
          i => change({ image: i, cell: about.images[i].cell, swapped: false })),
    choice('network', about.networks, () => state.network, i => change({ network: i })),
    choice('positives by', about.methods, () => state.method, i => change({ method: i })),
    slider('γ', 'power of the weights (gamma)', about.gammas, () => state.gamma, gamma => change({ gamma })),
    slider('τ', 'temperature of the dense loss (tau)', about.taus, () => state.tau, tau => change({ tau })),
    choice('query shows', ['photo', 'weights', 'cosines'], () => state.overlay, i => change({ overlay: i })),
    choice('colours for', ['the cell', 'the pair'], () => state.range, i => change({ range: i })),
  ]
  const parts = [images, networks, methods, gamma, tau, overlay, range]
  overlay[0].classList.add('under')
  range[0].classList.add('under')
  const queryBar = node('div')
  const keyBar = node('div')
  bars.append(node('div', {}, queryBar, overlay[0]), node('div', {}, keyBar, range[0]))
  const swap = node('button', { type: 'button', title: 'query and key change places (s)', onclick: turn }, '⇄ swap')
  const unpin = () => change({ pins: [] })
  const clear = node('button', { type: 'button', title: 'takes all pins away (Escape)', onclick: unpin }, 'unpin all')
  const own = about.networks.length > 1 ? `1 to ${about.networks.length} choose the network, ` : ''
  const help = node('p', { class: 'note help' }, 
                    'Point at a cell of the query; click, or tap twice, to pin it. Point at the key to read other cosines.',
                    node('span', { class: 'keys' }, ` Keys: arrows move, Enter pins, s swaps, ${own}Escape takes the pins away.`))
  const head = node('div', { class: 'head' }, node('h4', {}, 'dense loss of this cell'), tau[0])
  const side = node('div', { class: 'side' }, node('div', {}, table, gamma[0]), node('div', {}, head, losses))
  const doing = node('span', { class: 'group doing' }, swap, clear)
  root.append(images[0], node('div', { class: 'bar' }, networks[0], methods[0], doing),
              node('div', { class: 'body' }, node('div', {}, stage, bars, legend, maps, help), side), pinned, spoken)

  // what one does
  function turn() {
    const { positive } = numbers(state.cell, weights())            // its match becomes the query: does it match back?
    change({ swapped: !state.swapped, cell: Math.max(positive, 0) })
  }
  function pin(cell) {
    const same = p => p.image === state.image && p.swapped === state.swapped && p.cell === cell
    const pins = state.pins.filter(p => !same(p))
    if (pins.length === state.pins.length) pins.push({ image: state.image, swapped: state.swapped, cell })
    change({ pins: pins.slice(-about.pins.length), cell })
  }
  const point = cell => { if (cell !== state.cell) change({ cell }) }
  pointed(query.box, grid, point, (cell, touch) => touch && cell !== state.cell ? point(cell) : pin(cell))
  const read = cell => { here = cell; show() }
  pointed(key.box, grid, read, read, () => read(null))
  const keys = { Enter: () => pin(state.cell), ' ': () => pin(state.cell), s: turn, Escape: unpin }
  about.networks.forEach((_, i) => { keys[i + 1] = () => change({ network: i }) })
  steered(query.box, grid, () => state.cell, point, keys)

  // what is drawn anew
  const shapes = { best: circle, spatial: diamond, truth: cross }

  function layout() {
    const [h, w] = grid()
    const gap = stacked ? Math.max(h, w)*.13 : w*.16
    const [width, height] = stacked ? [w, 2*h + gap] : [2*w + gap, h]
    const [x, y] = stacked ? [0, h + gap] : [w + gap, 0]
    stage.style.aspectRatio = `${width} / ${height}`
    over.setAttribute('viewBox', `0 0 ${width} ${height}`)
    const put = (box, left, top) => Object.assign(box.style, {
      left: `${100*left/width}%`, top: `${100*top/height}%`, width: `${100*w/width}%`, height: `${100*h/height}%` })
    put(query.box, 0, 0)
    put(key.box, x, y)
    bars.style.gridTemplateColumns = stacked ? '1fr' : '1fr 1fr'
    bars.style.columnGap = `${100*gap/width}%`
    return { x, y, gap, h, w, r: Math.min(.38, 8*width/(stage.clientWidth || 800)) }    // of a mark: 8 pixels at most
  }

  /** The part of the line between two cells that lies in the gap. */
  function line(cell, match, { x, y, gap, h, w }, colour) {
    const [x0, y0] = [cell % w + .5, Math.floor(cell/w) + .5]
    const [x1, y1] = [match % w + .5 + x, Math.floor(match/w) + .5 + y]
    const at = t => [x0 + t*(x1 - x0), y0 + t*(y1 - y0)]
    const [begin, start, way] = stacked ? [h, y0, y1 - y0] : [w, x0, x1 - x0]
    const [from, to] = [(begin - start)/way, (begin + gap - start)/way]
    const [[a, b], [c, d]] = [at(from), at(to)]
    return draw('path', thin({ d: `M${a} ${b}L${c} ${d}`, stroke: colour, 'stroke-width': 2.5 }))
  }

  function showShapes(found, weight, place) {
    const { x, y, h, w, r } = place
    const at = (cell, dx = 0, dy = 0) => [cell % w + dx, Math.floor(cell/w) + dy]
    const edge = (inside, dx, dy) => {
      const one = more => draw('path', thin({ d: outline(inside, [h, w]), 'stroke-width': 1.6, ...more }))
      return draw('g', { transform: `translate(${dx} ${dy})` }, one({ stroke: '#000', 'stroke-opacity': .6 }),
                  one({ stroke: '#fff', 'stroke-dasharray': '4 4' }))
    }
    const items = []
    const seen = image().inside
    if (seen) items.push(edge(take(seen[view()]), 0, 0), edge(take(seen[1 - view()]), x, y))
    state.pins.filter(p => p.image === state.image && p.swapped === state.swapped).forEach(p => {
      const { positive } = numbers(p.cell, weight)
      const colour = pinColour(p)
      items.push(dot(...at(p.cell, .5, .5), colour, .8*r))
      if (positive < 0) return
      items.push(line(p.cell, positive, place, colour), dot(...at(positive, x + .5, y + .5), colour, .8*r))
    })
    if (found.positive >= 0) items.push(line(state.cell, found.positive, place, colours.positive))
    items.push(square(...at(state.cell), colours.query))
    for (const name of ['truth', 'spatial', 'best']) {
      if (found[name] == null || found[name] < 0) continue
      const positive = name === (method() === 'Coord' ? 'spatial' : 'best')
      items.push(shapes[name](...at(found[name], x, y), r, positive ? colours.positive : '#222', positive))
    }
    if (here != null) {
      const [left, top] = at(here, x, y)
      items.push(draw('rect', thin({ x: left, y: top, width: 1, height: 1, stroke: '#fff', 'stroke-width': 1.5 })))
    }
    over.replaceChildren(...items)
  }

  function bar(title, low, high, marks = []) {
    const at = value => `${100*Math.min(Math.max((value - low)/Math.max(high - low, 1e-12), 0), 1)}%`
    return node('div', {}, node('div', { class: 'scale', style: `background: ${gradient(map)}` },
                                marks.map(value => node('i', { style: `left: ${at(value)}` }))),
                node('div', { class: 'ends' }, [text(low, 2), title, text(high, 2)].map(word => node('span', {}, word))))
  }

  function showHeat(found, weight) {
    const { low, high, cosine } = network()
    const v = held(network())
    const row = rowOf(state.cell, network())
    const range = state.range ? [low[v], high[v]] : [Math.min(...row), Math.max(...row)]
    paint(key.heat, i => row[i], grid(), ...range, map)
    const best = take(cosine[view()])
    const shown = [null, [weight, 0, 1, 'weight in the dense loss'],
                   [best, Math.min(...best), Math.max(...best), 'cosine of the best match']][state.overlay]
    query.heat.style.display = shown ? '' : 'none'
    if (shown) paint(query.heat, i => shown[0][i], grid(), shown[1], shown[2], map)
    const read = here == null ? '' : `, here ${text(row[here], 2)}`
    queryBar.replaceChildren(shown ? bar(shown[3], shown[1], shown[2], [shown[0][state.cell]]) : '')
    keyBar.replaceChildren(bar(`cosine${read}`, ...range, here == null ? [found.cosine] : [found.cosine, row[here]]))
    return row
  }

  /** The map of the same cell under every network, to choose from. */
  function showMaps() {
    maps.replaceChildren(...about.networks.map((name, i) => {
      const from = image().networks[i]
      const row = rowOf(state.cell, from)
      const heat = node('canvas')
      paint(heat, k => row[k], grid(), Math.min(...row), Math.max(...row), map)
      const best = take(from.best[view()])[state.cell]
      const [h, w] = grid()
      const mark = draw('svg', { class: 'over', viewBox: `0 0 ${w} ${h}` },
                        dot(best % w + .5, Math.floor(best/w) + .5, colours.positive, .04*w))
      return node('button', { type: 'button', 'aria-pressed': String(i === state.network),
                              onclick: () => change({ network: i }), title: `this cell under the network '${name}'` },
                  node('div', {}, node('img', { src: key.image.src, alt: '' }), heat, mark), name)
    }))
  }

  const lineOf = (name, value, about) =>
    node('tr', { 'data-name': name, title: about }, node('th', {}, name), node('td', {}, value))

  function showNumbers(found, row) {
    const known = found.inside == null ? 'not known' : found.inside ? 'yes' : 'no'
    const where = (cell, cosine, none) => cell < 0 ? none : [node('b', {}, place(cell)), ` · ${cosine}`]
    const rows = [
      lineOf('cell', node('b', {}, place(state.cell)), 'row, column'),
      lineOf('best match', where(found.best, text(found.cosine)), 'row, column of the most similar key cell, and the cosine'),
      lineOf(image().inside ? 'spatial match' : 'same place',
              where(found.spatial, text(row[found.spatial], 2), 'not in the other view'),
              'row, column of the key cell at the same place, and the cosine'),
      image().truth ? lineOf('ground truth', where(found.truth, text(row[found.truth], 2), 'not measured'),
                              'from the measured disparity') : '',
      lineOf('best match is off by', found.off == null ? '–' : `${text(found.off, 1)} cells`,
              'distance to the ground truth, or to the spatial match'),
      lineOf('in the overlap', known, 'whether the other view sees the cell; of two photos no boxes tell'),
      lineOf(`${method()} weight`, node('b', {}, text(found.weight)), 'weight of this cell in the dense loss'),
    ]
    table.replaceChildren(node('table', {}, node('tbody', {}, rows)))
    spoken.textContent = `cell ${place(state.cell)}, best match ${place(found.best)}, cosine ${text(found.cosine)}, ` +
                         `weight ${text(found.weight)}`
  }

  function showLogits(logit) {
    const note = (...words) => node('p', { class: 'note' }, words)
    if (!network().dense) return losses.replaceChildren(note(network().note))
    if (!logit) return losses.replaceChildren(note('This cell has no positive and takes no part.'))
    const one = (name, value, part, colour) =>
      node('div', { class: 'logit', 'data-name': name }, node('span', {}, name),
           node('i', { style: `width: ${100*part}%; background: ${colour}` }),
           node('span', {}, value == null ? '' : text(value, 2)), node('span', {}, `${text(100*part, 1)} %`))
    const { n, nearest, hardest, part, rest, loss } = logit
    const left = n - hardest.length
    losses.replaceChildren(
      node('div', { class: 'logit note' }, ['', '', 'logit', 'softmax'].map(word => node('span', {}, word))),
      one('positive', nearest, part(nearest), colours.positive),
      ...hardest.map((l, i) => one(`negative ${i + 1}`, l, part(l), colours.negative)),
      left > 0 ? one(`${left} more`, null, rest, colours.queue) : '',
      note('loss ', node('b', { 'data-name': 'loss' }, text(loss)), '. Hardest negatives first. ', network().note))
  }

  const pinColour = p => about.pins[state.pins.indexOf(p) % about.pins.length]

  function showPins(weight) {
    const mine = state.pins.filter(p => p.image === state.image && p.swapped === state.swapped)
    clear.disabled = !state.pins.length
    if (!mine.length) return pinned.replaceChildren()
    const names = ['pinned cell', 'best match', 'cosine', 'off by', 'in the overlap', `${method()} weight`]
    const rows = mine.map(p => {
      const f = numbers(p.cell, weight)
      return [[node('span', { class: 'dot', style: `background: ${pinColour(p)}` }), place(p.cell)], place(f.best),
              text(f.cosine), text(f.off, 1), f.inside == null ? '–' : f.inside ? 'yes' : 'no', text(f.weight)]
    })
    const row = (tag, values) => node('tr', {}, values.map(value => node(tag, {}, value)))
    pinned.replaceChildren(node('table', {}, node('thead', {}, row('th', names)),
                                node('tbody', {}, rows.map(values => row('td', values)))))
  }

  function showLegend() {
    const by = method() === 'Coord' ? 'spatial' : 'best'
    const entry = (name, words) => {
      const colour = name === by ? colours.positive : '#222'
      const icon = draw('svg', { viewBox: '-.1 -.1 1.2 1.2' }, shapes[name](0, 0, .38, colour, name === by))
      return node('span', {}, icon, words + (name === by ? ' = positive' : ''))
    }
    const photo = image().inside
    legend.replaceChildren(entry('best', 'best match'), entry('spatial', photo ? 'spatial match' : 'same place'),
                           image().truth ? entry('truth', 'ground truth') : '',
                           photo ? node('span', {}, 'dashed: seen by both views') : '')
  }

  function show() {
    parts.forEach(part => part[1]())
    const v = view()
    const names = image().titles
    query.image.src = sources[state.image][v]
    key.image.src = sources[state.image][1 - v]
    query.tag.textContent = `query: ${names[v]}`
    key.tag.textContent = `key: ${names[1 - v]}, ${about.networks[state.network]}`
    query.box.setAttribute('aria-label', `${names[v]} of ${image().name}, the query: ` +
                           `${grid().join(' by ')} cells, move with the arrow keys`)
    const weight = weights()
    const found = numbers(state.cell, weight)
    const where = layout()
    const row = showHeat(found, weight)
    showShapes(found, weight, where)
    showNumbers(found, row)
    showLogits(logits(state.cell, found))
    showMaps()
    showLegend()
    showPins(weight)
  }

  const size = new ResizeObserver(([{ contentRect }]) => { stacked = contentRect.width < 460; show() })
  size.observe(root)
  show()
  return () => { size.disconnect(); stop() }
}

// ---- a cell and its nearest ones in other images ----

function gallery(model, root) {
  const about = model.get('about')
  const take = arrays(model.get('data'))
  const sources = about.images.map(image => dataUrl(take(image.view)))
  const { state, change, stop } = shared(model, about.start, () => show())
  const image = () => about.images[state.image]
  const grid = () => image().grid
  const query = makeView('query')
  query.heat.remove()
  const over = draw('svg', { class: 'over' })
  const stage = node('div', { class: 'stage' }, query.box, over)
  const tiles = node('div', { class: 'tiles' })
  const spoken = node('div', { class: 'sr', 'aria-live': 'polite' })
  const parts = [
    strip(about.images, sources, () => state.image, i => change({ image: i, cell: about.images[i].cell })),
    choice('network', about.networks, () => state.network, i => change({ network: i })),
  ]
  const own = about.networks.length > 1 ? ` Keys 1 to ${about.networks.length} choose the network.` : ''
  const help = node('p', { class: 'note help' },
                    'Point at a cell, or move with the arrow keys: its nearest cell in each other image, nearest image first.',
                    node('span', { class: 'keys' }, own))
  const body = node('div', { class: 'body gallery' }, node('div', {}, stage, help), tiles)
  root.append(parts[0][0], node('div', { class: 'bar' }, parts[1][0]), body, spoken)
  const point = cell => { if (cell !== state.cell) change({ cell }) }
  const keys = Object.fromEntries(about.networks.map((_, i) => [i + 1, () => change({ network: i })]))
  pointed(query.box, grid, point, point)
  steered(query.box, grid, () => state.cell, point, keys)

  function tile(number, cell, cosine) {
    const [h, w] = about.images[number].grid
    const mark = draw('svg', { class: 'over', viewBox: `0 0 ${w} ${h}` },
                      square(cell % w, Math.floor(cell/w), about.colours.positive))
    const picture = node('img', { src: sources[number], alt: about.images[number].name })
    return node('div', { class: 'tile' }, node('div', {}, picture, mark),
                node('b', {}, text(cosine)), ` ${about.images[number].name}`)
  }

  function show() {
    parts.forEach(part => part[1]())
    const [h, w] = grid()
    stage.style.aspectRatio = `${w} / ${h}`
    Object.assign(query.box.style, { inset: '0' })
    over.setAttribute('viewBox', `0 0 ${w} ${h}`)
    over.replaceChildren(square(state.cell % w, Math.floor(state.cell/w), about.colours.query))
    query.image.src = sources[state.image]
    query.tag.textContent = image().name
    query.box.setAttribute('aria-label', `${image().name}: ${h} by ${w} cells, move with the arrow keys`)
    const near = image().networks[state.network]
    const n = about.nearest
    const from = state.cell*n
    const [numbers, cells, cosines] = [near.image, near.cell, near.cosine].map(a => take(a).subarray(from, from + n))
    tiles.replaceChildren(...Array.from(numbers, (number, i) => tile(number, cells[i], cosines[i])))
    spoken.textContent = `cell ${Math.floor(state.cell/w) + 1}, ${state.cell % w + 1}: nearest in ` +
                         `${about.images[numbers[0]].name}, cosine ${text(cosines[0])}`
  }
  show()
  return stop
}

// ---- the two ways in ----

function render({ model, el }) {
  const host = node('div')
  const { colours, kind } = model.get('about')
  const style = `--query: ${colours.query}; --key: ${colours.key}; --on: ${colours.on}`
  const root = node('div', { class: 'root', style })
  host.attachShadow({ mode: 'open' }).append(node('style', {}, css), root)
  el.append(host)
  return (kind === 'gallery' ? gallery : pairs)(model, root)
}

/** Brings an element of a page to life: its script of type application/json holds all data. */
function mount(host) {
  if (host.dataset.alive) return
  host.dataset.alive = 'yes'
  const { about, data } = JSON.parse(host.querySelector('script').textContent)
  const bytes = Uint8Array.from(atob(data), character => character.charCodeAt(0))
  const values = { about, state: {}, data: new DataView(bytes.buffer) }
  const model = { get: name => values[name], set() {}, save_changes() {}, on() {}, off() {} }
  render({ model, el: host })
  host.querySelector('img').hidden = true                          // the picture for those who run no script
}

export default { render }
