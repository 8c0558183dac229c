// Draw the views of one photo, all in step: hover names the classes there in every mask, the legend isolates a
// class, the wheel or two fingers zoom into a place, and on a phone the views are swiped. Python sends masks as
// PNGs of codes; a code is a class id, or where classes may overlap an index of `sets`, the lists of class ids.
const SETTINGS = 'photo-views' // in sessionStorage: they stay from photo to photo
const IGNORED = 255
const SAME = 1, MISSED = 2, OTHER = 3
const WHITE = 0xffffffff
const LARGEST = 32 // pixels of the page that a pixel of the photo may become
const CENTRE = [0.5, 0.5]
const CLICK = 4 // pixels that the pointer may move in a click

export default function ({ parentElement, data }) {
  const root = parentElement.querySelector('.viewer')
  const held = new Map() // the last events of the pointers that are down
  let frame = 0, pointer = null, travelled = 0
  const settings = {
    opacity: 0.6, names: true, masks: true, errors: false, only: null, view: 0, large: null,
    ...JSON.parse(sessionStorage.getItem(SETTINGS) ?? '{}'),
  }
  // how often the photo is enlarged in its frame, and where its corner is then, in widths and heights of the frame
  const at = (root.at = root.at?.name === data.name ? root.at : { name: data.name, zoom: 1, corner: [0, 0] })
  const views = data.views.map((view) => makeView(view, data))
  const truth = views.find((view) => view.title === 'truth')
  const strip = make('div', { className: 'views' }, ...views.map((view) => view.figure))
  const tabs = make('div', { className: 'tabs' }, ...data.views.map((view, index) =>
    make('button', { textContent: view.title, onclick: () => swipeTo(index) })))
  const legend = make('div', { className: 'legend' }, ...legendButtons(data, (k) => {
    settings.only = settings.only === k ? null : k
    update()
  }))
  const opacity = make('input', { type: 'range', min: 0, max: 1, step: 0.05, value: settings.opacity })
  opacity.oninput = () => { settings.opacity = Number(opacity.value); update() }
  const [masks, names, errors] = ['masks', 'names', 'errors'].map((key) => {
    const box = make('input', { type: 'checkbox' })
    box.onchange = () => { settings[key] = box.checked; update() }
    return box
  })
  const bar = make('div', { className: 'bar' },
    make('label', {}, 'Opacity', opacity), make('label', {}, masks, 'Masks'), make('label', {}, names, 'Names'))
  if (truth) bar.append(make('label', { title: 'what is missed is striped' }, errors, 'Errors alone'))
  const percent = make('button', { title: 'Fit', onclick: () => zoomBy(0) })
  bar.append(make('span', { className: 'zoom' },
    make('button', { textContent: '−', title: 'Zoom out', onclick: () => zoomBy(1 / 1.5) }), percent,
    make('button', { textContent: '+', title: 'Zoom in', onclick: () => zoomBy(1.5) })))
  const keys = make('p', { className: 'keys' })
  keys.innerHTML = '<kbd>←</kbd> <kbd>→</kbd> photos, <kbd>G</kbd> grid, <kbd>M</kbd> masks, ' +
    `<kbd>N</kbd> names, ${truth ? '<kbd>E</kbd> errors alone, ' : ''}<kbd>Esc</kbd> all classes, ` +
    '<kbd>+</kbd> <kbd>−</kbd> or the wheel zoom, <kbd>0</kbd> or a double click fits; a click enlarges a picture'
  root.style.setProperty('--aspect', data.aspect)
  root.replaceChildren(bar, tabs, strip, legend, keys)

  function update() {
    if (!data.classes[settings.only]) settings.only = null // it is of another data set
    sessionStorage.setItem(SETTINGS, JSON.stringify(settings))
    root.classList.toggle('hide-masks', !settings.masks)
    root.classList.toggle('hide-names', !settings.names)
    masks.checked = settings.masks
    names.checked = settings.names
    errors.checked = settings.errors
    root.classList.toggle('only-errors', Boolean(settings.errors && truth))
    for (const button of legend.children) button.ariaPressed = String(button.classId === settings.only)
    for (const view of views) view.figure.classList.toggle('large', view.title === settings.large)
    draw()
  }
  function draw() {
    const scale = at.zoom * Math.max(...views.map((view) => view.picture.clientWidth)) / data.width
    root.classList.toggle('zoomed', at.zoom > 1)
    root.classList.toggle('pixels', scale * devicePixelRatio >= 2)
    percent.textContent = `${Math.round(100 * scale * data.scale)} %`
    root.style.setProperty('--zoom', at.zoom)
    root.style.setProperty('--x', `${100 * at.corner[0]}%`)
    root.style.setProperty('--y', `${100 * at.corner[1]}%`)
    for (const view of views) {
      paint(view)
      view.placeNames(at, settings.only)
    }
  }
  function paint(view) {
    view.paint(at, settings, settings.errors && truth?.codes && view.isMask && view !== truth ? truth : null)
  }
  function zoomBy(factor, from = pointer ?? CENTRE, to = from) { // what was at one place comes to the other
    const zoom = between(1, at.zoom * factor, LARGEST * data.width / views[0].picture.clientWidth)
    at.corner = at.corner.map((corner, axis) =>
      between(1 - zoom, to[axis] - (from[axis] - corner) * zoom / at.zoom, 0))
    at.zoom = zoom
    cancelAnimationFrame(frame)
    frame = requestAnimationFrame(draw)
  }
  function markTab() {
    settings.view = Math.round(strip.scrollLeft / strip.clientWidth) || 0
    sessionStorage.setItem(SETTINGS, JSON.stringify(settings))
    for (const [index, tab] of [...tabs.children].entries()) tab.ariaPressed = String(index === settings.view)
  }
  function swipeTo(index, behavior = 'smooth') {
    strip.scrollTo({ left: index * strip.clientWidth, behavior })
  }
  function hover(event) {
    const picture = pictureOf(event)
    pointer = picture ? placeIn(picture, event) : null
    const lines = picture && views.filter((view) => view.isMask).map((view) =>
      make('div', {}, `${view.title}: `, ...describe(view.classesAt(at, pointer), data)))
    for (const view of views) view.point(view.picture === picture ? lines : null, pointer)
  }
  function down(event) {
    const picture = pictureOf(event)
    if (!picture || event.button) return
    if (!held.size) travelled = 0
    held.set(event.pointerId, event)
    picture.setPointerCapture(event.pointerId)
  }
  function move(event) {
    hover(event)
    if (!held.has(event.pointerId)) return
    const picture = pictureOf(event), before = measure(held)
    held.set(event.pointerId, event)
    const after = measure(held)
    travelled += Math.hypot(after.clientX - before.clientX, after.clientY - before.clientY)
    zoomBy(after.spread / before.spread, placeIn(picture, before), placeIn(picture, after))
  }
  function release(event) {
    held.delete(event.pointerId)
  }
  function wheel(event) {
    const picture = pictureOf(event)
    const factor = Math.exp(-event.deltaY * (event.deltaMode ? 0.05 : event.ctrlKey ? 0.01 : 0.002))
    const scrolls = at.zoom === 1 && factor <= 1 && !event.ctrlKey
    if (!picture || scrolls || !event.cancelable) return
    event.preventDefault()
    zoomBy(factor, placeIn(picture, event))
  }
  function click(event) {
    const view = views.find((one) => one.picture === pictureOf(event))
    if (!view || at.zoom > 1 || travelled > CLICK) return
    settings.large = settings.large === view.title ? null : view.title
    update()
  }
  function pinch(event) { // else the browser zooms or scrolls the page
    if (event.touches.length > 1) event.preventDefault()
  }
  function press(event) {
    const target = event.composedPath()[0]
    if (event.ctrlKey || event.metaKey || event.altKey || target.isContentEditable) return
    if (/^(INPUT|TEXTAREA|SELECT)$/.test(target.tagName) && !/^(range|checkbox)$/.test(target.type)) return
    const key = event.key.toLowerCase()
    if (key === 'm') settings.masks = !settings.masks
    else if (key === 'n') settings.names = !settings.names
    else if (key === 'e') settings.errors = !settings.errors
    else if (key === 'escape') settings.only = null
    else if (key === '+' || key === '=') return zoomBy(1.5)
    else if (key === '-') return zoomBy(1 / 1.5)
    else if (key === '0') return zoomBy(0)
    else return
    update()
  }
  strip.onpointermove = move
  strip.onpointerdown = (event) => { down(event); hover(event) }
  strip.onpointerup = strip.onpointercancel = release
  strip.onpointerleave = hover
  strip.onclick = click
  strip.ondblclick = () => at.zoom > 1 && zoomBy(0)
  strip.onscroll = markTab
  for (const [kind, listen] of [['wheel', wheel], ['touchstart', pinch], ['touchmove', pinch]])
    strip.addEventListener(kind, listen, { passive: false })
  const sizes = new ResizeObserver(draw)
  sizes.observe(strip)
  document.addEventListener('keydown', press)
  update()
  swipeTo(settings.view, 'instant')
  markTab()
  let current = true
  for (const view of views) {
    view.load().then(() => current && (view === truth ? views : [view]).forEach(paint))
  }
  return () => {
    current = false
    cancelAnimationFrame(frame)
    sizes.disconnect()
    document.removeEventListener('keydown', press)
  }
}

function make(tag, properties, ...children) {
  const element = Object.assign(document.createElement(tag), properties)
  element.append(...children)
  return element
}

function between(low, value, high) {
  return Math.max(low, Math.min(value, high))
}

function pictureOf(event) {
  return event.composedPath().find((one) => one.classList?.contains('picture'))
}

// Return where an event is in a picture, in its width and height.
function placeIn(picture, { clientX, clientY }) {
  const box = picture.getBoundingClientRect()
  return [(clientX - box.left) / box.width, (clientY - box.top) / box.height]
}

// Return the middle of the pointers that are down, and how far they are from it.
function measure(held) {
  const events = [...held.values()]
  const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length
  const clientX = mean(events.map((event) => event.clientX)), clientY = mean(events.map((event) => event.clientY))
  const spread = mean(events.map((event) => Math.hypot(event.clientX - clientX, event.clientY - clientY)))
  return { clientX, clientY, spread: spread || 1 }
}

function swatch(colour) {
  const element = make('span', { className: 'swatch' })
  element.style.background = `rgb(${colour})`
  return element
}

function describe(ids, { classes }) {
  if (!ids.length) return ['–']
  return ids.flatMap((k, n) => [...(n ? [', '] : []), swatch(classes[k].colour), classes[k].name])
}

function legendButtons({ classes, legend, visible }, choose) {
  return legend.map((k) => {
    const button = make('button', { title: `Show ${classes[k].name} alone`, classId: k, onclick: () => choose(k) },
      swatch(classes[k].colour), classes[k].name)
    button.classList.toggle('absent', !visible.includes(k))
    return button
  })
}

function makeView(view, data) {
  const image = make('img', { src: data.photo, alt: `${data.name}: ${view.caption}`, draggable: false })
  const canvas = make('canvas', {}) // of the pixels of the page, whatever the size of the mask
  const here = make('span', { className: 'here' })
  const tip = make('div', { className: 'tip' })
  const names = (view.labels ?? []).map(([k, ...place]) => {
    const name = make('span', { className: 'name', textContent: data.classes[k].name, classId: k, place })
    name.style.borderColor = `rgb(${data.classes[k].colour})`
    return name
  })
  const picture = make('div', { className: 'picture' },
    make('div', { className: 'frame' }, image, canvas, ...names), here, tip)
  const caption = make('figcaption', { title: view.caption }, make('b', { textContent: view.title }),
    view.caption.slice(view.title.length))
  const figure = make('figure', { className: view.colour ? 'pale' : view.title === 'truth' ? 'truth' : '' },
    caption, picture)
  const isMask = Boolean(view.mask && !view.colour)
  let width, height
  const sets = {}
  const classesOf = (code) => (sets[code] ??= view.sets ? view.sets[code] : code ? [code] : [])
  const colourOf = (k) => view.colour ?? data.classes[k].colour

  const made = {
    figure, picture, classesOf, isMask, title: view.title, codes: null,
    async load() {
      if (!view.mask) return
      const mask = make('img', { src: view.mask })
      await mask.decode()
      ;[width, height] = [mask.naturalWidth, mask.naturalHeight]
      const context = make('canvas', { width, height }).getContext('2d', { willReadFrequently: true })
      context.drawImage(mask, 0, 0)
      const { data: bytes } = context.getImageData(0, 0, width, height)
      const codes = new Uint16Array(width * height)
      for (let n = 0; n < codes.length; n++) codes[n] = bytes[4 * n] + (view.sets ? 256 * bytes[4 * n + 1] : 0)
      made.codes = codes
    },
    paint(at, settings, truth) { // with a truth, only where the mask is not the same
      if (!made.codes) return
      const { opacity, only } = isMask ? settings : { opacity: 1, only: null }
      const { codes } = made, ratio = Math.min(2, devicePixelRatio)
      const w = Math.max(1, Math.round(picture.clientWidth * ratio))
      const h = Math.max(1, Math.round(picture.clientHeight * ratio))
      if (canvas.width !== w || canvas.height !== h) Object.assign(canvas, { width: w, height: h })
      const context = canvas.getContext('2d'), drawn = context.createImageData(w, h)
      const pixels = new Uint32Array(drawn.data.buffer)
      const radius = Math.max(1, Math.round(Math.min(w, h) / 400)) // of the outlines
      const columns = sample(w, radius, at.zoom, at.corner[0], width)
      const rows = sample(h, radius, at.zoom, at.corner[1], height)
      const fills = [], edges = [], misses = []
      const shown = (ids) => ids.filter((k) => only === null || k === only)
      const missOf = (code, true_) => ((misses[code] ??= [])[true_] ??=
        compare(classesOf(code), truth.classesOf(true_), shown))
      const fillOf = (code) => (fills[code] ??= mix(shown(classesOf(code)).map(colourOf), opacity))
      const edgeOf = (code, near) => code === near ? 0 : ((edges[code] ??= [])[near + 1] ??= mix(
        shown(classesOf(code)).filter((k) => near < 0 || !classesOf(near).includes(k)).slice(0, 1).map(colourOf), 1))
      const nearest = (code, nears) => nears.reduce((colour, near) => colour || edgeOf(code, near), 0)
      let code, trueCode, fill, miss
      for (let y = 0, n = 0; y < h; y++) {
        const [up, row, down] = [rows[y], rows[y + radius], rows[y + 2 * radius]].map((one) => one * width)
        for (let x = 0; x < w; x++, n++) {
          const left = columns[x], column = columns[x + radius], right = columns[x + 2 * radius]
          if (codes[row + column] !== code || truth && truth.codes[row + column] !== trueCode) {
            code = codes[row + column]
            trueCode = truth?.codes[row + column]
            miss = truth && missOf(code, trueCode)
            fill = miss === SAME ? 0 : fillOf(code)
          }
          if (miss === MISSED && (x + y) % (8 * radius) < 4 * radius) pixels[n] = WHITE
          if (!fill) continue
          const west = left < 0 ? -1 : codes[row + left], east = right < 0 ? -1 : codes[row + right]
          const north = up < 0 ? -1 : codes[up + column], south = down < 0 ? -1 : codes[down + column]
          const inside = west === code && east === code && north === code && south === code
          pixels[n] = inside ? fill : nearest(code, [west, east, north, south]) || fill
        }
      }
      context.putImageData(drawn, 0, 0)
    },
    placeNames({ zoom, corner }, only) { // the largest first; a name that would cover another is left out
      const taken = [], frame = [picture.clientWidth, picture.clientHeight]
      const sizes = names.map((name) => [name.offsetWidth, name.offsetHeight])
      for (const [n, name] of names.entries()) {
        const middle = name.place.map((share, axis) => (share * zoom + corner[axis]) * frame[axis])
        // one at the edge is moved into the frame
        const low = middle.map((m, axis) => between(0, m - sizes[n][axis] / 2, frame[axis] - sizes[n][axis]))
        const high = low.map((start, axis) => start + sizes[n][axis])
        const shown = (only === null || name.classId === only) &&
          middle.every((m, axis) => m >= 0 && m <= frame[axis]) &&
          !taken.some((other) => [0, 1].every((axis) => low[axis] < other.high[axis] && other.low[axis] < high[axis]))
        name.style.visibility = shown ? '' : 'hidden'
        name.style.translate = `${low[0]}px ${low[1]}px`
        if (shown) taken.push({ low, high })
      }
    },
    classesAt({ zoom, corner }, place) {
      const [x, y] = place.map((share, axis) => (share - corner[axis]) / zoom)
      const [column, row] = [Math.floor(x * width), Math.floor(y * height)]
      const inside = made.codes && column >= 0 && row >= 0 && column < width && row < height
      return inside ? classesOf(made.codes[row * width + column]) : []
    },
    point(lines, place) {
      here.style.display = place && !lines ? 'block' : 'none'
      tip.style.display = lines?.length ? 'block' : 'none'
      if (!place) return
      const [x, y] = place
      here.style.left = `${100 * x}%`
      here.style.top = `${100 * y}%`
      if (!lines) return
      tip.replaceChildren(...lines)
      tip.style[x < 0.5 ? 'left' : 'right'] = `calc(${100 * (x < 0.5 ? x : 1 - x)}% + 14px)`
      tip.style[x < 0.5 ? 'right' : 'left'] = 'auto'
      tip.style[y < 0.5 ? 'top' : 'bottom'] = `calc(${100 * (y < 0.5 ? y : 1 - y)}% + 10px)`
      tip.style[y < 0.5 ? 'bottom' : 'top'] = 'auto'
    },
  }
  return made
}

// Return which of `length` pixels of a mask is at each of `count` pixels of the page, and at `margin` more on either
// side: -1 outside the photo.
function sample(count, margin, zoom, corner, length) {
  return Int32Array.from({ length: count + 2 * margin }, (_, n) => {
    const pixel = Math.floor(((n - margin + 0.5) / count - corner) / zoom * length)
    return pixel < length ? Math.max(-1, pixel) : -1
  })
}

// Tell whether a pixel has the classes of its truth, and whether one that is shown is missed there. What is ignored
// in the truth cannot be wrong.
function compare(ids, truth, shown) {
  if (truth.includes(IGNORED) || String(ids) === String(truth)) return SAME
  return shown(truth).some((k) => !ids.includes(k)) && !shown(ids).length ? MISSED : OTHER
}

// Return the mean of colours, as the four bytes of a pixel; 0 of none.
function mix(colours, opacity) {
  if (!colours.length) return 0
  const [r, g, b] = [0, 1, 2].map((band) => colours.reduce((sum, rgb) => sum + rgb[band], 0) / colours.length)
  return ((255 * opacity) << 24 | b << 16 | g << 8 | r) >>> 0
}
