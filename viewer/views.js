// Draw the views of one photo, all in step: hover names the classes there in every mask, the legend isolates a
// class, and on a phone the views are swiped. Python sends masks as PNGs of codes; a code is a class id, or
// where classes may overlap an index of `sets`, the lists of class ids.
const SETTINGS = 'photo-views' // in sessionStorage: they stay from photo to photo
const IGNORED = 255
const SAME = 1, MISSED = 2, OTHER = 3
const STRIPE = { rgb: [255, 255, 255], edge: true }

export default function ({ parentElement, data }) {
  const root = parentElement.querySelector('.viewer')
  const settings = {
    opacity: 0.6, names: true, masks: true, errors: false, only: null, view: 0,
    ...JSON.parse(sessionStorage.getItem(SETTINGS) ?? '{}'),
  }
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
  const keys = make('p', { className: 'keys' })
  keys.innerHTML = '<kbd>←</kbd> <kbd>→</kbd> photos, <kbd>G</kbd> grid, <kbd>M</kbd> masks, ' +
    `<kbd>N</kbd> names, ${truth ? '<kbd>E</kbd> errors alone, ' : ''}<kbd>Esc</kbd> all classes; ` +
    'a click enlarges a picture'
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
    for (const view of views) paint(view)
    placeNames()
  }
  function paint(view) {
    view.paint(settings, settings.errors && truth?.codes && view !== truth ? truth : null)
  }
  function placeNames() {
    for (const view of views) view.placeNames(settings.only)
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
    const picture = event.composedPath().find((one) => one.classList?.contains('picture'))
    const box = picture?.getBoundingClientRect()
    const x = box && (event.clientX - box.left) / box.width
    const y = box && (event.clientY - box.top) / box.height
    const lines = box && views.filter((view) => view.codes).map((view) =>
      make('div', {}, `${view.title}: `, ...describe(view.classesAt(x, y), data)))
    for (const view of views) view.point(view.picture === picture ? lines : null, x, y, Boolean(box))
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
    else return
    update()
  }
  strip.onpointermove = strip.onpointerdown = hover
  strip.onpointerleave = hover
  strip.onscroll = markTab
  const sizes = new ResizeObserver(placeNames)
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
    sizes.disconnect()
    document.removeEventListener('keydown', press)
  }
}

function make(tag, properties, ...children) {
  const element = Object.assign(document.createElement(tag), properties)
  element.append(...children)
  return element
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
  const image = make('img', { src: view.picture ?? data.photo, alt: `${data.name}: ${view.caption}`, draggable: false })
  const canvas = make('canvas', {})
  const here = make('span', { className: 'here' })
  const tip = make('div', { className: 'tip' })
  const names = (view.labels ?? []).map(([k, x, y]) => {
    const name = make('span', { className: 'name', textContent: data.classes[k].name, classId: k })
    name.style.cssText = `left: ${100 * x}%; top: ${100 * y}%; border-color: rgb(${data.classes[k].colour})`
    return name
  })
  const picture = make('div', { className: 'picture' }, image, canvas, ...names, here, tip)
  const caption = make('figcaption', { title: view.caption }, make('b', { textContent: view.title }),
    view.caption.slice(view.title.length))
  const figure = make('figure', { className: view.title === 'truth' ? 'truth' : '' }, caption, picture)
  picture.onclick = () => figure.classList.toggle('large')
  let width, height, loaded
  const sets = {}
  const classesOf = (code) => (sets[code] ??= view.sets ? view.sets[code] : code ? [code] : [])

  const made = {
    figure, picture, classesOf, title: view.title, codes: null,
    async load() {
      if (!view.mask) return
      const mask = make('img', { src: view.mask })
      await mask.decode()
      ;[width, height] = [mask.naturalWidth, mask.naturalHeight]
      Object.assign(canvas, { width, height })
      const context = canvas.getContext('2d', { willReadFrequently: true })
      context.drawImage(mask, 0, 0)
      loaded = context.getImageData(0, 0, width, height)
      const codes = new Uint16Array(width * height)
      for (let n = 0; n < codes.length; n++) codes[n] = loaded.data[4 * n] + 256 * loaded.data[4 * n + 1]
      made.codes = codes
    },
    paint({ opacity, only }, truth) { // with a truth, only where the mask is not the same
      if (!made.codes) return
      const { codes } = made, pixels = loaded.data
      const radius = Math.max(1, Math.round(Math.min(width, height) / 400)) // of the outlines
      const fills = {}, misses = {}
      const shown = (ids) => ids.filter((k) => only === null || k === only)
      for (let n = 0, y = 0; y < height; y++) {
        for (let x = 0; x < width; x++, n++) {
          const code = codes[n]
          const miss = truth && (misses[65536 * code + truth.codes[n]] ??=
            compare(classesOf(code), truth.classesOf(truth.codes[n]), shown))
          const fill = (fills[code] ??= mix(shown(classesOf(code)), data))
          let colour = miss === SAME ? null : fill
          if (miss === MISSED && (x + y) % (8 * radius) < 4 * radius) colour = STRIPE
          else if (colour) {
            for (const m of [x < radius ? -1 : n - radius, x + radius < width ? n + radius : -1,
              y < radius ? -1 : n - radius * width, y + radius < height ? n + radius * width : -1]) {
              if (m >= 0 && codes[m] === code) continue
              const beyond = m < 0 ? [] : classesOf(codes[m])
              const edge = fill.ids.find((k) => !beyond.includes(k))
              if (edge !== undefined) { colour = { rgb: data.classes[edge].colour, edge: true }; break }
            }
          }
          pixels.set(colour ? colour.rgb : [0, 0, 0], 4 * n)
          pixels[4 * n + 3] = colour ? (colour.edge ? 255 : 255 * opacity) : 0
        }
      }
      canvas.getContext('2d').putImageData(loaded, 0, 0)
    },
    placeNames(only) { // the largest first; a name that would cover another is left out
      const taken = [], frame = picture.getBoundingClientRect()
      for (const name of names) {
        name.hidden = only !== null && name.classId !== only
        name.style.visibility = name.style.translate = ''
        if (name.hidden) { name.style.visibility = 'hidden'; continue }
        let box = name.getBoundingClientRect()
        const inside = Math.max(frame.left - box.left, 0) + Math.min(frame.right - box.right, 0)
        name.style.translate = `${inside}px` // one at the edge of the photo is moved into it
        box = name.getBoundingClientRect()
        const covers = taken.some((one) => box.left < one.right && one.left < box.right &&
          box.top < one.bottom && one.top < box.bottom)
        if (covers) name.style.visibility = 'hidden'
        else taken.push(box)
      }
    },
    classesAt(x, y) {
      const [column, row] = [Math.floor(x * width), Math.floor(y * height)]
      const inside = column >= 0 && row >= 0 && column < width && row < height
      return inside ? classesOf(made.codes[row * width + column]) : []
    },
    point(lines, x, y, inside) {
      here.style.display = inside && !lines ? 'block' : 'none'
      here.style.left = `${100 * x}%`
      here.style.top = `${100 * y}%`
      tip.style.display = lines?.length ? 'block' : 'none'
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

// Tell whether a pixel has the classes of its truth, and whether one that is shown is missed there. What is ignored
// in the truth cannot be wrong.
function compare(ids, truth, shown) {
  if (truth.includes(IGNORED) || String(ids) === String(truth)) return SAME
  return shown(truth).some((k) => !ids.includes(k)) && !shown(ids).length ? MISSED : OTHER
}

function mix(ids, { classes }) {
  if (!ids.length) return null
  const rgb = [0, 1, 2].map((band) => ids.reduce((sum, k) => sum + classes[k].colour[band], 0) / ids.length)
  return { ids, rgb }
}
